"""LoRA and QLoRA: train small additions to a frozen model.

The additions are made by `peft`, the 4-bit weights by `bitsandbytes`. This file adds what they leave out: names that match
no layer are refused with the names that exist, and an adapter remembers which weights it was trained on.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Trainer
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from sft.flags import ModelArguments, TrainingArguments
from sft.job import UserError, say

RANK, DROPOUT, ALL_LINEAR = 16, 0.05, "all-linear"


BASE_RECORD = "base_model.json"  # beside the adapter: the name and the fingerprint of the weights it was trained on


def lora_problems(flags) -> list[str]:
    """What is wrong with the LoRA flags, known before anything is loaded."""
    given = [
        f"--{name}"
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "merge_lora")
        if getattr(flags, name)
    ]
    if not flags.use_lora:
        return [f"{', '.join(given)}: set, but LoRA is off. Add --use_lora True."] if given else []
    found = []
    if flags.lora_r is not None and flags.lora_r < 1:
        found.append(f"--lora_r {flags.lora_r}: a rank is at least 1.")
    if flags.lora_dropout is not None and not 0 <= flags.lora_dropout < 1:
        found.append(f"--lora_dropout {flags.lora_dropout}: it lies between 0 and 1.")
    if (flags.fsdp_config or {}).get("activation_checkpointing"):
        found.append(
            '--use_lora with "activation_checkpointing" in --fsdp_config: peft (0.21) would save an empty adapter. '
            "Use --gradient_checkpointing True instead."
        )
    if importlib.util.find_spec("peft") is None:
        found.append("--use_lora needs the package peft. Run: pip install peft")
    if flags.load_in_4bit:
        if not torch.cuda.is_available():
            found.append("--load_in_4bit needs a CUDA GPU and none was found. Remove the flag: LoRA alone runs here.")
        elif importlib.util.find_spec("bitsandbytes") is None:
            found.append("--load_in_4bit needs the package bitsandbytes. Run: pip install bitsandbytes")
    return found


def target_problems(config, target_modules: list[str] | None) -> list[str]:
    """Names in --lora_target_modules that match no linear layer of the model, with the names that do.

    peft itself is silent as long as one name of several matches.
    """
    if target_modules in (None, [ALL_LINEAR]):
        return []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    candidates = sorted({name.rsplit(".", 1)[-1] for name in linear})
    return [
        f"--lora_target_modules {target}: no linear layer of this model has that name. It has {', '.join(candidates)}."
        for target in target_modules
        if not any(name == target or name.endswith(f".{target}") for name in linear)
    ]


def load_options(model_args: ModelArguments, training_args: TrainingArguments) -> dict:
    """Keyword arguments for `from_pretrained`: frozen weights need no float32, they are never updated.

    They are held in the compute type, to which every product would cast them anyway, or in 4 bits.
    """
    compute = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    options: dict = {"dtype": compute}
    if model_args.load_in_4bit:
        # FSDP and ZeRO-3 shard floating tensors only: there the 4-bit pairs are stored as bytes of such a type
        # (accelerate 1.15, utils/fsdp_utils.py).
        sharded = bool(training_args.fsdp or training_args.deepspeed)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=compute if sharded else torch.uint8,
        )
        if not sharded:
            options["device_map"] = {"": training_args.device}
    return options


def add_adapters(model: PreTrainedModel, model_args: ModelArguments, training_args: TrainingArguments):
    """Freeze the model, add trainable float32 additions (peft's LoRA), and say how much of it is trained."""
    from peft import LoraConfig, get_peft_model

    rank = model_args.lora_r or RANK
    targets = model_args.lora_target_modules or [ALL_LINEAR]
    config = LoraConfig(
        r=rank,
        lora_alpha=model_args.lora_alpha or 2 * rank,
        lora_dropout=DROPOUT if model_args.lora_dropout is None else model_args.lora_dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    if training_args.gradient_checkpointing:
        # A checkpointed layer whose input needs no gradient would compute none for its own parameters.
        peft_model.enable_input_require_grads()
    names = sorted({name.rsplit(".", 1)[-1] for name in peft_model.peft_config["default"].target_modules})
    sizes = [(_size(p), p.requires_grad) for p in peft_model.parameters()]
    trained, whole = sum(size for size, on in sizes if on), sum(size for size, _ in sizes)
    say(
        f"LoRA: rank {rank}, alpha {config.lora_alpha}, dropout {config.lora_dropout} on "
        f"{', '.join(names)}: "
        f"{trained:,} trained of {whole:,} parameters ({trained / whole:.2%})"
    )
    return peft_model


def _size(parameter: torch.nn.Parameter) -> int:
    """Number of weights: ZeRO-3 leaves an empty tensor, and 4-bit weights lie packed."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def save(trainer: Trainer, model_args: ModelArguments, merged_dtype: torch.dtype) -> Path:
    """Save the adapter to the output folder, or to `adapter` inside it when the whole model goes to the output folder.

    Every rank calls it (ZeRO-3 gathers); rank 0 writes and merges. Returns the adapter's folder.
    """
    output = Path(trainer.args.output_dir)
    adapter = output / "adapter" if model_args.merge_lora else output
    trainer.save_model(str(adapter))
    if trainer.args.should_save:
        record_base(adapter, model_args)
        if model_args.merge_lora:
            _merge_in_another_process(adapter, output, merged_dtype, model_args.cache_dir)
    return adapter


def _merge_in_another_process(adapter: Path, output: Path, dtype: torch.dtype, cache_dir: str | None) -> None:
    """In this one, ZeRO-3 would split the base among the ranks while it loads (transformers 5.23, modeling_utils.py)."""
    command = [sys.executable, "-m", "sft.merge_lora", "--adapter", str(adapter), "--output", str(output)]
    command += ["--save_dtype", str(dtype).removeprefix("torch.")] + (["--cache_dir", cache_dir] if cache_dir else [])
    torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    environment = {name: value for name, value in os.environ.items() if name not in torchrun}
    project = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([project, *filter(None, [environment.get("PYTHONPATH")])])
    subprocess.run(command, env=environment, check=True)


def weights_digest(model_name_or_path: str, cache_dir: str | None = None) -> str:
    """A hash of a checkpoint's tensors: their names, shapes, and up to 256 values of each, spread over it.

    The values are read as bfloat16, so the same weights stored in another type have the same fingerprint. Only the pages
    that are sampled are read, a second or so for 7 B parameters.
    """
    lines = []
    for file in _checkpoint_files(model_name_or_path, cache_dir):
        lines += _describe_safetensors(file) if file.endswith(".safetensors") else _describe_pickle(file)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _checkpoint_files(model_name_or_path: str, cache_dir: str | None) -> list[str]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        options = {"cache_dir": cache_dir, "_raise_exceptions_for_missing_entries": False}
        single = cached_file(model_name_or_path, name, **options)
        if single:
            return [single]
        index = cached_file(model_name_or_path, f"{name}.index.json", **options)
        if index:
            return get_checkpoint_shard_files(model_name_or_path, index, cache_dir=cache_dir)[0]
    raise UserError(f"{model_name_or_path}: no model.safetensors and no pytorch_model.bin there.")


def _describe_safetensors(file: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return [_describe(name, tensors.get_tensor(name)) for name in tensors.keys()]  # noqa: SIM118 (no mapping)


def _describe_pickle(file: str) -> list[str]:
    tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return [_describe(name, tensor) for name, tensor in tensors.items()]


def _describe(name: str, tensor: torch.Tensor) -> str:
    values = tensor.flatten()[:: max(1, tensor.numel() // 256)].to(torch.bfloat16).view(torch.int16)
    return f"{name} {list(tensor.shape)} {hashlib.sha256(values.numpy().tobytes()).hexdigest()}"


def record_base(adapter: str | os.PathLike, model_args: ModelArguments) -> None:
    """Write beside the adapter which weights it was trained on."""
    record = {
        "model_name_or_path": model_args.model_name_or_path,
        "fingerprint": weights_digest(model_args.model_name_or_path, model_args.cache_dir),
        "loaded_in_4bit": model_args.load_in_4bit,
    }
    Path(adapter, BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
