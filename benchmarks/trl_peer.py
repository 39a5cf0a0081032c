"""TRL's SFTTrainer at its best on the model, the rows and the tokens per optimizer step of a run of this project.

    torchrun --nproc_per_node=4 benchmarks/trl_peer.py MODEL ROWS.csv RESULT.json STEPS [EXAMPLES_PER_STEP [FOLDER]]

Packed rows, Liger, no activation checkpointing, this project's attention kernel, FSDP2 where there is more than one GPU.
STEPS may be "epoch"; the model is saved in FOLDER, if one is given. Writes a JSON object with the median of the second half of the
steps and the seconds of each phase since the process began.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
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


def main(model: str, rows: str, result: str, steps: str, examples_per_step: str = "64", folder: str = "") -> None:
    cuda = torch.cuda.is_available()
    marks = [time.perf_counter() - (time.time() - psutil.Process().create_time()), time.perf_counter()]
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
        output_dir=folder or tempfile.mkdtemp(),
        **({"num_train_epochs": 1} if steps == "epoch" else {"max_steps": int(steps)}),
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
    marks.append(time.perf_counter())
    trainer.train()
    marks += [clock.ends[0], time.perf_counter()]
    if folder:
        trainer.save_model()
    marks.append(time.perf_counter())
    names = ("start", "data_and_model", "first_step", "steps", "save")
    ends = clock.ends[len(clock.ends) // 2 :]
    seconds = statistics.median(end - start for start, end in itertools.pairwise(ends))
    if rank() == 0:
        packed = [len(row) for row in trainer.train_dataset["input_ids"]]
        found = {
            "tokens_per_step": tokens * world_size(),
            "fill": statistics.fmean(packed) / tokens,
            "steps": len(clock.ends),
            "step_s": seconds,
            "phases": {name: end - start for name, (start, end) in zip(names, itertools.pairwise(marks))},
            "tokens_per_s_per_gpu": statistics.fmean(packed) / seconds,
            "peak_memory_gib": peak_memory_gib(config.device),
        }
        Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
