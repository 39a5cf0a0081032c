"""Everything behind utils.py, in floors. A floor imports only the floors above it in this list.

outside                               texts, secrets and files that come from outside
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
import os
import sys
from typing import Any

IGNORE_INDEX = -100  # a label that is not trained on, as in PyTorch's cross-entropy
VERSION = "0.1.0"  # of CHANGELOG.md and pyproject.toml

# Rows differ in length from step to step: without it the GPU's memory is full of pieces that nothing fits into, before it is full.
# Not tried on several GPUs.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _in_one_line(kind: type[BaseException], *error: Any) -> None:
    """Ctrl-C while a command still imports; later `job.one_message_for_user_errors` sees it."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *error)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print("error: interrupted.", file=sys.stderr)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _in_one_line

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
