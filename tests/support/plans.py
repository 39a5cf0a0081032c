"""Memory plans of models that are never loaded."""

import json
from pathlib import Path

import pytest
from scripts import ROOT
from transformers import (
    LlamaConfig,
)

from sft.flags import parser
from sft.plan import memory, memory_ladder, model_sizes

OPEN_LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)


TINY_LLAMA_1B = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
)
OPEN_LLAMA_3B = LlamaConfig(
    hidden_size=3200, intermediate_size=8640, num_hidden_layers=26, num_attention_heads=32, vocab_size=32000
)


TINY = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def flags(*argv: str):
    given = [
        "--model_name_or_path",
        "m",
        "--data_path",
        "d",
        "--output_dir",
        "o",
        "--bf16",
        "True",
        "--model_max_length",
        "1024",
        "--per_device_train_batch_size",
        "2",
        *argv,
    ]
    parsed = parser().parse_known_args([*given, "--plan_only", "True"])[0]
    parsed.fsdp_config = json.loads(parsed.fsdp_config) if parsed.fsdp_config else None
    return parsed


SHAPES: dict[tuple[str, str], model_sizes.Shape] = {}  # what a layer keeps is measured once for each


def measured(config, targets: list[str] | None) -> model_sizes.Shape:
    key = config.to_json_string(), str(targets)
    if key not in SHAPES:
        SHAPES[key] = model_sizes.Shape(config, targets)
    return SHAPES[key]


def plan_of(config, *argv: str, step_tokens: int | None = None) -> memory.Plan:
    parsed = flags("--plan_gpu_gib", "80", *argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_ladder, "Shape", measured)
        return memory_ladder.plan(parsed, parsed, config, step_tokens)


def deepspeed_file(folder: Path, **zero) -> str:
    """ds_config.json, edited."""
    file = json.loads((ROOT / "ds_config.json").read_text())
    file["zero_optimization"] |= zero
    (folder / "edited.json").write_text(json.dumps(file))
    return str(folder / "edited.json")
