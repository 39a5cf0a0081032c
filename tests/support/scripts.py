"""The real scripts, run as a user does, and a tiny model for them."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent

QUESTIONS = [
    (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(1, 9) for b in range(1, 9)
]  # 64 rows of 10 to 30 tokens


def save_llama(folder: Path, vocab_size: int, **config) -> None:
    """Save a random two-layer LLaMA, the same one each time."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(shape | config))).save_pretrained(folder)


def run_script(script: str, *flags: str, processes: int = 0, expect: int = 0, env: dict | None = None) -> str:
    """Run a script of the project as a user does and return what it printed, both streams together.

    Args:
        processes: 0 without torchrun, else `torchrun --nproc_per_node`.
        expect: the exit code that must come back.
    """
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    ended = subprocess.run(
        [*launcher, str(ROOT / script), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ended.returncode == expect, ended.stdout
    return ended.stdout
