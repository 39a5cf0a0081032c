"""What a training run can switch on or needs checked: one file for each."""
