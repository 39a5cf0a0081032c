"""What a run tells: its record, the printed lines, speed, the picture. `python -m sft.report` compares runs."""
