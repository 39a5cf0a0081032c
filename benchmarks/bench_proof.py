"""How long the proof before the first step takes, and what it finds, on models of real size with random weights.

    python benchmarks/bench_proof.py                    # 1.1B, 7B, 7B with LoRA and a mixture of experts, on one GPU: under a minute
    python benchmarks/bench_proof.py --models tiny      # on any machine

Each proof is made twice: the first one compiles Triton's kernels and loads cuBLAS's, which the run needs anyway. Reading the
checkpoint's first layers from the disk is left out.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft import IGNORE_INDEX
from sft.arithmetic import compute_dtype
from sft.job import Choice
from sft.model import lora
from sft.plan import proof
from sft.plan.settle import prepare_step
from sft.step.attention import choose_attention
from sft.step.loss import LIGER, loss_kernel
from sft.step.packed_rows import PackedCollator, group_by_prefix

WIDE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
EXPERTS = {
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "1.1B": ("llama", {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}),
    "7B": ("llama", WIDE),
    "7B LoRA": ("llama", WIDE),
    "mixture": ("qwen3_moe", EXPERTS | {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}),
    "tiny": ("llama", {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 512}),
}  # fmt: skip
LENGTHS = (184, 207, 1024)  # tokens: two rows of the usual length, and the longest


def rows(vocabulary: int) -> list[proof.Example]:
    """Rows whose prompts, a third of each, begin with 30 tokens alike."""
    generator, made = torch.Generator().manual_seed(0), []
    for length in LENGTHS:
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        ids[:30] = torch.arange(
            3, 33
        )  # 0 is the pad token: a row of zeros, whose gradient each norm makes a thousand times larger
        made.append({"input_ids": ids, "labels": torch.where(torch.arange(length) < 34, IGNORE_INDEX, ids)})
    return made


def timed(prove: Callable[[], Any], device: torch.device) -> tuple[Any, list[float]]:
    """What is found, and the seconds of the first and the second time."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        found = prove()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return found, seconds


def measure(name: str, device: torch.device) -> list[str]:
    """Lines of the table: the proof of the first layers, and that of the whole model."""
    kind, shape = SHAPES[name]
    config = AutoConfig.for_model(kind, **({"vocab_size": 32000, "pad_token_id": 0} | shape))
    cuda = device.type == "cuda"
    args: Any = SimpleNamespace(
        device=device,
        bf16=cuda,
        fp16=False,
        deepspeed=None,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
    )
    model_args: Any = SimpleNamespace(model_name_or_path="random", trust_remote_code=False, lora_r=16, lora_alpha=None, lora_dropout=0.0,
                                      lora_target_modules=None)  # fmt: skip
    half, examples = compute_dtype(args), rows(config.vocab_size)
    kernel = choose_attention(config, device, half).value
    if cuda:
        from sft.step import attention_kernel  # noqa: F401  registers its operator

    def layers(_: Any, __: Any, small: Any) -> Any:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(small, dtype=torch.float32)

    proof.loaded_layers = layers  # type: ignore[assignment]
    found, seconds = timed(lambda: proof.prove(model_args, args, config, examples, kernel), device)
    lines = [line(name, one, seconds if one is found[-1] else None) for one in found]
    adapters = name.endswith("LoRA")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=half if adapters else torch.float32, attn_implementation=kernel
        )
    model.config.use_cache = False
    if adapters:
        model = lora.add_adapters(model, model_args, args)
    kernel_of_loss, loss = loss_kernel(device, False)
    how = {"kernel": kernel_of_loss, "liger": loss.value == LIGER, "compilation": Choice("", False, "")}
    settled: Any = SimpleNamespace(packing=True, device=device, **how)
    head = prepare_step(model, settled)

    def whole() -> proof.Proof:
        few = proof.beginnings(examples, proof.TOKENS)[: proof.WHOLE_EXAMPLES]
        with torch.autocast(device.type, half, enabled=cuda):
            return proof.prove_whole(model, head, PackedCollator(group_by_prefix), few, cuda, together=True)

    found, seconds = timed(whole, device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return [*lines, f"{line(name, found, seconds)} peak {peak:.1f} GiB"]


def line(name: str, found: proof.Proof, seconds: list[float] | None) -> str:
    """One row of the table; the seconds of several proofs stand in the last one's."""
    took = " ".join(f"{each:6.2f}" for each in seconds) if seconds else " " * 13
    numbers = " ".join(f"{value:9.0e}" for value in found[:4])
    return f"{name:8} {found.weights[:34]:34} {took} {numbers} {'FAULT: ' + found.fault if found.fault else 'ok'}"


def main() -> None:
    """Measure each model, and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    transformers.utils.logging.set_verbosity_error()
    device, table = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    for name in parser.parse_args().models:
        table += measure(name, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"\n{where}, torch {torch.__version__}, transformers {transformers.__version__}; seconds: first and second time"
    )
    print(
        f"{'model':8} {'proved with':34} {'seconds':>13} {'loss':>9} {'gradient':>9} {'isolation':>9} {'causality':>9}"
    )
    print("\n".join(table))


if __name__ == "__main__":
    main()
