"""Compute the examples, steps and number types of a run, each once."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from sft.flags import ModelArguments
from sft.job import UserError
from sft.outside import counted


def compute_dtype(flags: Any) -> torch.dtype:
    return torch.bfloat16 if flags.bf16 else torch.float16 if flags.fp16 else torch.float32


def export_dtype(args: Any) -> torch.dtype:
    return getattr(torch, args.save_dtype) if args.save_dtype else compute_dtype(args)


@dataclass(frozen=True)
class Arithmetic:
    """How many examples and steps; run_report.json keeps it as `batch`."""

    ranks: int
    per_device: int
    accumulation: int
    examples_per_step: int
    steps_per_epoch: int
    steps: int

    @classmethod
    def of(cls, args: Any, examples: int) -> "Arithmetic":
        """From TrainingArguments whose accumulation is still the user's. A UserError when no step is left."""
        ranks, per_device = args.world_size, args.per_device_train_batch_size
        accumulation = args.gradient_accumulation_steps
        step = ranks * per_device * accumulation
        steps_per_epoch = ceil(examples / step)
        if args.dataloader_drop_last:
            # the stock samplers (--packing False with another --train_sampling_strategy) drop a micro-batch, ours a step
            ours = args.packing or args.train_sampling_strategy == "random"
            steps_per_epoch = examples // step if ours else ceil(examples // (ranks * per_device) / accumulation)
        if steps_per_epoch == 0:
            raise UserError(
                f"--dataloader_drop_last True drops all {examples} examples: an optimizer step takes {step} ({counted(ranks, 'rank')} x "
                f"{per_device} per device x {accumulation} accumulation). Remove the flag, or make the step smaller."
            )
        steps = args.max_steps if args.max_steps > 0 else ceil(args.num_train_epochs * steps_per_epoch)
        return cls(ranks, per_device, accumulation, step, steps_per_epoch, steps)

    def lines(self, examples: int, device: str) -> str:
        """What a user checks first: `4 GPUs x 2 per device x 8 accumulation = 64 examples per optimizer step`, and the steps."""
        one, many = ("CPU process", "CPU processes") if device == "cpu" else ("GPU", "GPUs")
        return (
            f"{self.ranks} {one if self.ranks == 1 else many} x {self.per_device} per device x {self.accumulation} "
            f"accumulation = {counted(self.examples_per_step, 'example')} per optimizer step\n"
            f"{counted(examples, 'example')}: {counted(self.steps_per_epoch, 'optimizer step')} per epoch, {self.steps:,} in this run"
        )


@dataclass(frozen=True)
class Precision:
    """The number type of each part."""

    compute: torch.dtype
    export: torch.dtype
    gradients: torch.dtype
    summed: torch.dtype  # gradients, while they are added up between GPUs
    frozen: torch.dtype | str | None  # weights under LoRA
    weights: torch.dtype = torch.float32
    optimizer: torch.dtype = torch.float32

    @classmethod
    def of(cls, model_args: ModelArguments, args: Any) -> "Precision":
        compute = compute_dtype(args)
        in_compute = args.deepspeed and args.hf_deepspeed_config.get_value("data_types.grad_accum_dtype") != "fp32"
        gradients = compute if in_compute else torch.float32  # sft/plan/deepspeed_file.py warns of it
        summed = compute if args.fsdp and args.world_size > 1 else gradients  # accelerate 1.15, dataclasses.py
        frozen = ("4 bits (nf4)" if model_args.load_in_4bit else compute) if model_args.use_lora else None
        return cls(compute, export_dtype(args), gradients, summed, frozen)

    def record(self) -> dict[str, str]:
        """The types by name, as run_report.json keeps them."""
        names = ("weights", "gradients", "optimizer", "compute", "export", "frozen")
        return {name: str(getattr(self, name)).removeprefix("torch.") for name in names if getattr(self, name)}

    def __str__(self) -> str:
        types = self.record()
        frozen = f"frozen weights in {types['frozen']}; trained additions: " if self.frozen else ""
        gradients = "gradients and optimizer state"
        if self.gradients != self.weights:
            gradients = f"optimizer state, gradients summed in {types['gradients']}"
        elif self.summed != self.gradients:
            gradients = f"gradients (added up between GPUs in {types['compute']}) and optimizer state"
        return (
            f"precision: {frozen}{types['weights']} weights, {gradients}, "
            f"{types['compute']} compute, exported as {types['export']}"
        )
