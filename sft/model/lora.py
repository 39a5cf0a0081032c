"""Train small additions to a frozen model: LoRA, and QLoRA with 4-bit weights."""

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from sft.arithmetic import compute_dtype
from sft.flags import ModelArguments, TrainingArguments
from sft.job import UserError, say
from sft.model.loading import numel

BASE_RECORD = "base_model.json"  # next to the adapter: name and fingerprint of the weights it was trained on


def lora_problems(flags) -> list[str]:
    """Check the LoRA flags and the packages they need."""
    if not flags.use_lora:
        names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "merge_lora")
        given = [f"--{name}" for name in names if getattr(flags, name) != getattr(ModelArguments, name)]
        return [f"{', '.join(given)}: set, but LoRA is off. Add --use_lora True."] if given else []
    missing = [name for name in ("peft", "bitsandbytes") if find_spec(name) is None]
    four_bit, cuda = flags.load_in_4bit, torch.cuda.is_available()
    checkpointing = (
        '--use_lora with "activation_checkpointing" in --fsdp_config: peft (0.21) would save an empty adapter. '
        "Use --gradient_checkpointing True instead."
    )
    no_gpu = "--load_in_4bit needs a CUDA GPU and none was found. Remove the flag: LoRA alone runs here."
    four_bit_package = "--load_in_4bit needs the package bitsandbytes. Run: pip install bitsandbytes"
    problems = {
        f"--lora_r {flags.lora_r}: a rank is at least 1.": flags.lora_r < 1,
        f"--lora_dropout {flags.lora_dropout}: it lies between 0 and 1.": not 0 <= flags.lora_dropout < 1,
        checkpointing: (flags.fsdp_config or {}).get("activation_checkpointing"),
        "--use_lora needs the package peft. Run: pip install peft": "peft" in missing,
        no_gpu: four_bit and not cuda,
        four_bit_package: four_bit and cuda and "bitsandbytes" in missing,
    }
    return [problem for problem, is_so in problems.items() if is_so]


def load_options(model_args: ModelArguments, training_args: TrainingArguments) -> dict:
    """Keyword arguments for `from_pretrained`: frozen weights are held in 4 bits or in the type that products cast them to."""
    compute = compute_dtype(training_args)
    options: dict = {"dtype": compute}
    if model_args.load_in_4bit:
        # FSDP and ZeRO-3 shard floating tensors only: there the 4-bit pairs are stored as bytes of such a type
        # (accelerate 1.15, utils/fsdp_utils.py).
        sharded = bool(training_args.fsdp or training_args.deepspeed)
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        types = {"bnb_4bit_compute_dtype": compute, "bnb_4bit_quant_storage": compute if sharded else torch.uint8}
        options["quantization_config"] = BitsAndBytesConfig(**nf4, **types)
        options |= {} if sharded else {"device_map": {"": training_args.device}}
    return options


def add_adapters(model: PreTrainedModel, model_args: ModelArguments, training_args: TrainingArguments):
    """Freeze the model, add trainable float32 additions (peft's LoRA), and print how much of it is trained."""
    from peft import LoraConfig, get_peft_model

    targets, r = model_args.lora_target_modules or ["all-linear"], model_args.lora_r
    target_modules = "all-linear" if targets == ["all-linear"] else targets
    scale: dict[str, Any] = {"lora_alpha": model_args.lora_alpha or 2 * r, "lora_dropout": model_args.lora_dropout}
    config = LoraConfig(r=r, target_modules=target_modules, task_type="CAUSAL_LM", **scale)
    peft_model = get_peft_model(model, config)
    if training_args.gradient_checkpointing:
        # A checkpointed layer whose input needs no gradient would compute none for its own parameters.
        peft_model.enable_input_require_grads()
    names = sorted({name.rsplit(".", 1)[-1] for name in peft_model.peft_config["default"].target_modules})
    whole = sum(numel(p) for p in peft_model.parameters())
    trained = sum(numel(p) for p in peft_model.parameters() if p.requires_grad)
    say(
        f"LoRA: rank {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout} on {', '.join(names)}: "
        f"{trained:,} of {whole:,} parameters are trained ({trained / whole:.2%})"
    )
    return peft_model


def finish_adapter(adapter: Path, output: Path, model_args: ModelArguments, merged_dtype: torch.dtype) -> None:
    """Write next to a saved adapter what it belongs to and, with --merge_lora, the whole model to the output folder."""
    record_base(adapter, model_args)
    if model_args.merge_lora:
        command = [sys.executable, "-m", "sft.merge_lora", "--adapter", str(adapter), "--output", str(output)]
        command += ["--save_dtype", str(merged_dtype).removeprefix("torch.")]
        command += ["--cache_dir", model_args.cache_dir] if model_args.cache_dir else []
        # without torchrun's environment: transformers (5.23, modeling_utils.py) would load the base as this job's rank
        job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
        environment = {name: value for name, value in os.environ.items() if name not in job}
        path = [str(Path(__file__).resolve().parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
        subprocess.run(command, env=environment | {"PYTHONPATH": os.pathsep.join(path)}, check=True)


def record_base(adapter: str | os.PathLike, model_args: ModelArguments) -> None:
    """Write next to the adapter which weights it was trained on."""
    name, cache_dir = model_args.model_name_or_path, model_args.cache_dir
    record: dict[str, Any] = {"model_name_or_path": name, "fingerprint": weights_digest(name, cache_dir)}
    record["loaded_in_4bit"] = model_args.load_in_4bit
    Path(adapter, BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def weights_digest(model_name_or_path: str, cache_dir: str | None = None) -> str:
    """Hash the names, the shapes and up to 256 values of each tensor of a checkpoint: a second or so for 7 B parameters.

    The values are read as bfloat16, so that the same weights stored in another type have the same digest.
    """
    lines = []
    for file in _checkpoint_files(model_name_or_path, cache_dir):
        for name, tensor in load_state_dict(file).items():  # mapped: only what is read here comes from the disk
            values = tensor.flatten()[:: max(1, tensor.numel() // 256)].to(torch.bfloat16).view(torch.int16)
            lines.append(f"{name} {list(tensor.shape)} {hashlib.sha256(values.numpy().tobytes()).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _checkpoint_files(model_name_or_path: str, cache_dir: str | None) -> list[str]:
    options = {"cache_dir": cache_dir, "_raise_exceptions_for_missing_entries": False}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if single := cached_file(model_name_or_path, name, **options):
            return [single]
        if index := cached_file(model_name_or_path, f"{name}.index.json", **options):
            return get_checkpoint_shard_files(model_name_or_path, index, cache_dir=cache_dir)[0]
    raise UserError(f"{model_name_or_path}: no model.safetensors and no pytorch_model.bin there.")
