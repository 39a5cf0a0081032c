"""What is decided before a weight is loaded: every choice of a run, the memory it needs, the DeepSpeed file."""
