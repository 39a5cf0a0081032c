"""Everything behind utils.py, in floors. A floor imports only the floors above it in this list.

outside                               texts, secrets and files that come from outside
launchers                             ranks, the store where they meet, and what a launcher may say besides the flags
job                                   printed lines, errors, and the ranks' ends
flags_2023, trainer_flags             what a command line may say besides today's flags
flags, arithmetic                     each flag once; examples, steps and number types
data, model, step                     the recipe: rows to tokens; weights; one optimizer step. They do not know each other
plan                                  what is decided, and printed, before a weight is loaded
saving, report                        checkpoints and export; the record of a run. They do not know each other either
run                                   the Trainer, and what is attached to it
generate, merge_lora                  commands
"""

import importlib.util
import logging
import os
import sys
from typing import Any

IGNORE_INDEX = -100  # a label that is not trained on, as in PyTorch's cross-entropy
VERSION = "0.1.0"  # of CHANGELOG.md and pyproject.toml

# Rows differ in length from step to step: without it the GPU's memory is full of pieces that nothing fits into, before it is full.
# Not tried on several GPUs.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# before torch is imported: when a launcher has died, its store's clients would warn with a page of C++ frames (2.13)
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# bitsandbytes (0.50), which transformers and peft import where it is installed, warns of a kernel for 4-bit weights on a CPU
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda line: "gemm_4bit_forward" not in line.getMessage())


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
