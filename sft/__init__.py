"""Everything behind utils.py, in floors. A floor imports only the floors above it in this list.

job, flags_2023, flags, arithmetic    ranks and errors; flags; examples and steps
data, model, step                     the recipe: rows to tokens; weights; one optimizer step. They do not know each other
plan                                  what is decided, and printed, before a weight is loaded
saving, report                        checkpoints and export; the record of a run. They do not know each other either
run                                   the Trainer, and what is attached to it
generate, merge_lora                  commands
"""

IGNORE_INDEX = -100  # a label that is not trained on, as in PyTorch's cross-entropy
