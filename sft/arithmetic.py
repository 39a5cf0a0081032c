"""Examples, steps and number types of a run, each computed once."""

import math

import torch

from sft.flags import ModelArguments, TrainingArguments


def compute_dtype(training_args: TrainingArguments) -> torch.dtype:
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32


def export_dtype(training_args: TrainingArguments) -> torch.dtype:
    """The type of the exported weights: --save_dtype, else the compute type."""
    return getattr(torch, training_args.save_dtype) if training_args.save_dtype else compute_dtype(training_args)


def plan(args: TrainingArguments, examples: int) -> dict[str, int]:
    """The arithmetic of the run."""
    step = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(examples / step)
    return {
        "ranks": args.world_size,
        "per_device": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "examples_per_step": step,
        "steps_per_epoch": steps_per_epoch,
        "steps": args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch),
    }


def precision(model_args: ModelArguments, args: TrainingArguments) -> dict[str, str]:
    """The number type of each part."""
    names = {"weights": torch.float32, "gradients": torch.float32, "optimizer": torch.float32}
    names |= {"compute": compute_dtype(args), "export": export_dtype(args)}
    if args.deepspeed and args.hf_deepspeed_config.get_value("data_types.grad_accum_dtype") != "fp32":
        names["gradients"] = names["compute"]  # sft/plan/deepspeed_file.py warns of it
    types = {part: str(dtype).removeprefix("torch.") for part, dtype in names.items()}
    if model_args.use_lora:
        types["frozen"] = "4 bits (nf4)" if model_args.load_in_4bit else types["compute"]
    return types


def describe_plan(model_args: ModelArguments, args: TrainingArguments, examples: int) -> str:
    """The arithmetic of the run and its number types, in the lines that a user checks first."""
    arithmetic, types = plan(args, examples), precision(model_args, args)
    device = "CPU process" if args.device.type == "cpu" else "GPU"
    frozen = f"frozen weights in {types['frozen']}; trained additions: " if "frozen" in types else ""
    gradients = "gradients and optimizer state"
    if types["gradients"] != types["weights"]:
        gradients = f"optimizer state, gradients summed in {types['gradients']}"
    elif args.fsdp and args.world_size > 1 and types["compute"] != types["weights"]:
        gradients = f"gradients (added up between GPUs in {types['compute']}) and optimizer state"  # accelerate 1.15, dataclasses.py
    many = "" if args.world_size == 1 else "s" if device == "GPU" else "es"
    return "\n".join(
        [
            "{ranks} {device} x {per_device} per device x {accumulation} accumulation = {examples_per_step} examples per "
            "optimizer step".format(device=device + many, **arithmetic),
            f"{examples:,} examples: {arithmetic['steps_per_epoch']:,} optimizer steps per epoch, "
            f"{arithmetic['steps']:,} in this run",
            f"precision: {frozen}{types['weights']} weights, {gradients}, {types['compute']} compute, "
            f"exported as {types['export']}",
        ]
    )
