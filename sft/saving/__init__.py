"""Checkpoints that are whole or absent, exact resume, the rehearsal, and the exported model with its proof."""
