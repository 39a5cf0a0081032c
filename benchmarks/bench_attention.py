"""Attention over packed rows on a GPU: our Triton kernels beside FlashAttention 2 (torch's `varlen_attn`).

    python benchmarks/bench_attention.py [--output results.jsonl]

Forward and backward pass of one layer, milliseconds, medians; rows of 24,576 tokens in bf16, of equal examples and of examples
with the lengths of real instructions (benchmarks/instruction_lengths.csv). One JSON line for each, a Markdown table last.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.step import attention

TOKENS = 24_576
SHAPES = {
    "1.1B: 32 heads of 64, 4 key heads": (32, 4, 64),
    "7B: 32 of 128": (32, 32, 128),
}
KERNELS: dict[str, Callable] = {attention.TRITON: attention.triton, attention.VARLEN: attention.varlen}


def rows() -> dict[str, list[int]]:
    """Lengths of the examples of one row, by name."""
    with open(Path(__file__).with_name("instruction_lengths.csv"), newline="", encoding="utf-8") as file:
        lengths = [min(int(total), 1024) for _, total, _ in list(csv.reader(file))[1::73]]
    equal = {f"{length} each": [length] * (TOKENS // length) for length in (64, 128, 256, 512, 1024, 2048, 4096)}
    return {"instructions": lengths, **equal}


def milliseconds(kernel: str, shape: tuple[int, int, int], lengths: list[int]) -> float:
    """Of a forward and a backward pass, as the model calls the kernel."""
    heads, key_heads, head_dim = shape
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (
        torch.randn(1, tokens, count, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    )
    gradient = torch.randn_like(q)
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    words = {"cu_seq_lens_q": starts, "max_length_q": max(lengths)}

    def both() -> None:
        views = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, _ = KERNELS[kernel](None, *views, None, head_dim**-0.5, **words)
        torch.autograd.grad(out, (q, k, v), gradient)

    return do_bench(both, warmup=10, rep=40, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a file for the JSON lines")
    flags = parser.parse_args()
    found: list[dict[str, Any]] = []
    for shape_name, shape in SHAPES.items():
        for row_name, lengths in rows().items():
            times = {kernel: milliseconds(kernel, shape, lengths) for kernel in KERNELS}
            typical = sum(length**2 for length in lengths) / sum(lengths)
            found.append({"shape": shape_name, "examples": row_name, "typical_length": typical, **times})
            print(json.dumps(found[-1]), flush=True)
    if flags.output:
        flags.output.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {TOKENS} tokens, forward and backward, ms\n")
    print("| heads | examples | triton | varlen | |\n|---|---|---|---|---|")
    for line in found:
        ours, theirs = line[attention.TRITON], line[attention.VARLEN]
        print(f"| {line['shape']} | {line['examples']} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} x |")


if __name__ == "__main__":
    main()
