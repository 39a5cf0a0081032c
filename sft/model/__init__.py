"""The pretrained model: loading it, LoRA, and files that must not run code."""
