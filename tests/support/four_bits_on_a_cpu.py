"""--load_in_4bit True on a CPU.

The scripts want a GPU for that, because a CPU is far too slow for a model that needs it. bitsandbytes has kernels for both, so
that what QLoRA does under FSDP2, ZeRO and data parallel can be tested without one.
"""

import sys

import fsdp_over_gloo

from sft.model.lora import lora_problems
from sft.plan import settle
from sft.run import prepare


def without_a_gpu(flags) -> list[str]:
    return [text for text in lora_problems(flags) if "needs a CUDA GPU" not in text]


def prepare_rank() -> None:
    """In a rank, before it trains."""
    prepare.CHECKS = tuple(without_a_gpu if check is lora_problems else check for check in prepare.CHECKS)
    # in evaluation mode bitsandbytes (0.50) repacks the weights for a CPU's kernel, which has no right gradient
    settle.rows_for_the_whole = lambda *_: []
    if "--fsdp" in sys.argv:
        fsdp_over_gloo.prepare_rank()
