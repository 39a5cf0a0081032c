"""Run llama_training.py, or the script in RUN, with --load_in_4bit True on a CPU.

The scripts want a GPU for that, because a CPU is far too slow for a model that needs it. bitsandbytes has kernels for both, so
that what QLoRA does under FSDP2, ZeRO and data parallel can be tested without one.
"""

import os
import runpy
import sys

from scripts import ROOT

sys.path.insert(0, str(ROOT))

from sft.model import lora

problems = lora.lora_problems

if __name__ == "__main__":
    lora.lora_problems = lambda flags: [text for text in problems(flags) if "needs a CUDA GPU" not in text]
    runpy.run_path(str(ROOT / os.environ.get("RUN", "llama_training.py")), run_name="__main__")
