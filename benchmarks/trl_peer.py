"""TRL's SFTTrainer at its best on the model, the rows and the tokens per optimizer step of a run of this project.

    torchrun --nproc_per_node=4 benchmarks/trl_peer.py MODEL ROWS.csv RESULT.json STEPS [EXAMPLES_PER_STEP]

Packed rows, Liger, no activation checkpointing, this project's attention kernel, FSDP2 where there is more than one GPU.
Writes a JSON object with the median of the second half of the steps.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.job import rank, world_size
from sft.report.speed import peak_memory_gib
from sft.step import attention


class Clock(transformers.TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main(model: str, rows: str, result: str, steps: str, examples_per_step: str = "64") -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        from sft.step import attention_kernel  # noqa: F401  registers its operator
    table = load_dataset("csv", data_files=rows, split="train").rename_column("response", "completion")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    sample = table.select(range(min(2000, len(table))))
    lengths = [
        len(tokenizer(f"{row['prompt']}{row['completion']}").input_ids) + 1  # and EOS
        for row in sample
    ]
    tokens = round(statistics.fmean(lengths) * int(examples_per_step) / world_size())
    sharding: dict[str, Any] = {}
    if cuda and world_size() > 1:
        layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
        sharding = {"fsdp": True, "fsdp_config": layers}
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=int(steps),
        per_device_train_batch_size=1,
        max_length=tokens,
        packing=True,
        bf16=True,
        use_cpu=not cuda,
        use_liger_kernel=cuda,
        gradient_checkpointing=False,
        learning_rate=2e-5,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        model_init_kwargs={
            "dtype": "float32",
            "attn_implementation": attention.TRITON if cuda else attention.PER_EXAMPLE,
        },
        **sharding,
    )
    clock = Clock()
    trainer = SFTTrainer(model=model, args=config, train_dataset=table, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    ends = clock.ends[len(clock.ends) // 2 :]
    seconds = statistics.median(end - start for start, end in itertools.pairwise(ends))
    if rank() == 0:
        packed = [len(row) for row in trainer.train_dataset["input_ids"]]
        found = {
            "tokens_per_step": tokens * world_size(),
            "fill": statistics.fmean(packed) / tokens,
            "tokens_per_s_per_gpu": statistics.fmean(packed) / seconds,
            "peak_memory_gib": peak_memory_gib(config.device),
        }
        Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
