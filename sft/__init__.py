"""Everything behind utils.py, in floors. A floor imports only the floors above it in this list.

job                                   ranks, printed lines, errors
flags_2023, launchers, trainer_flags  what a command line or a launcher may say besides today's flags
flags, arithmetic                     each flag once; examples, steps and number types
data, model, step                     the recipe: rows to tokens; weights; one optimizer step. They do not know each other
plan                                  what is decided, and printed, before a weight is loaded
saving, report                        checkpoints and export; the record of a run. They do not know each other either
run                                   the Trainer, and what is attached to it
generate, merge_lora                  commands
"""

import importlib.util
import sys

IGNORE_INDEX = -100  # a label that is not trained on, as in PyTorch's cross-entropy
VERSION = "0.1.0"  # of CHANGELOG.md and pyproject.toml

missing = [
    name for name in ("torch", "transformers", "accelerate", "sentencepiece") if not importlib.util.find_spec(name)
]
if missing:
    print(
        f"error: {', '.join(missing)}: not installed for {sys.executable}. Activate the environment first (source .venv/bin/activate), "
        "or run: pip install -r requirements.txt",
        file=sys.stderr,
    )
    raise SystemExit(2)
