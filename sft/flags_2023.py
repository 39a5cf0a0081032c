"""Translate the flags of 2023 to today's, and name the flag that was meant by an unknown one."""

import difflib
import json
import os
from pathlib import Path

import transformers
from transformers.hf_argparser import string_to_bool as is_true

from sft.outside import is_secret, without_password

RENAMED = {  # transformers 4.31 -> 5.x, and two misspellings of the original README's parameter table
    "evaluation_strategy": "eval_strategy",
    "num_training_epochs": "num_train_epochs",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "activation_checkpointing": "gradient_checkpointing",  # a newer name, which not every supported version knows
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
WRAP_CLASS = ("fsdp_transformer_layer_cls_to_wrap", "fsdp_transformer_later_cls_to_wrap")
FSDP_WORDS = ("full_shard", "shard_grad_op", "hybrid_shard", "auto_wrap", "offload")
GONE = {  # flag -> what to do without it
    "use_mps_device": "an Apple GPU is used where there is one",
    "jit_mode_eval": "there is no such mode",
    "use_ipex": "there is no such mode",
    "fp16_opt_level": "apex is not used",
    "half_precision_backend": "PyTorch's own mixed precision is used",
    "fp16_backend": "PyTorch's own mixed precision is used",
    "sharded_ddp": "use --fsdp",
    "fsdp_min_num_params": "the model's layers are wrapped by their class",
    "adafactor": "use --optim adafactor",
    "use_legacy_prediction_loop": "there is one loop",
    "torchdynamo": "use --torch_compile_backend",
    "xpu_backend": "use --ddp_backend",
    "push_to_hub_organization": "use --hub_model_id organization/name",
}


def translate(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Rewrite the flags of 2023 as today's.

    ["--evaluation_strategy", "no"] -> ["--eval_strategy", "no"] and "`--evaluation_strategy no` is now `--eval_strategy no`"

    Returns: the arguments to parse, one notice for each change, and the problems (a value that has no translation).
    """
    flags = _split_into_flags(argv)
    out: list[str] = []
    notices, problems, fsdp_old = [], [], []
    # rank 0 reads, others get shards
    fsdp_config: dict[str, object] = {"version": 2, "cpu_ram_efficient_loading": True}
    warmup = [
        f"--{name} {values[0]}" for name, values in flags if name == "warmup_steps" and values[:1] not in ([], ["0"])
    ]
    for name, values in flags:
        old = _quoted(name, values)
        try:
            if name in WRAP_CLASS and values:
                fsdp_config["transformer_layer_cls_to_wrap"] = values
                fsdp_old.append(old)
            elif name == "fsdp" and values and values[0].lower() not in ("true", "false"):
                fsdp_config |= _fsdp_words(" ".join(values).split())
                fsdp_old.insert(0, old)
            elif name == "warmup_ratio" and warmup:
                notices.append(f"`{old}` is ignored: {warmup[-1]} wins, as it did in transformers 4")
            else:
                new, notice = _today(name, values)
                out += new
                notices += [f"`{old}` {notice}"] * bool(notice)
        except ValueError as error:
            problems.append(f"`{old}`: {error}" if name not in GONE else str(error))
    notices += _given_twice(out)
    if fsdp_old:
        given = [values[-1] for name, values in _split_into_flags(out) if name == "fsdp_config" and values]
        try:
            fsdp_config |= read_json("--fsdp_config", given[-1]) if given else {}
        except ValueError as error:
            problems.append(str(error))
        out = [
            word for name, values in _split_into_flags(out) if name != "fsdp_config" for word in (f"--{name}", *values)
        ]
        out += ["--fsdp", "true", "--fsdp_config", json.dumps(fsdp_config)]
        notices.append(f"`{' '.join(fsdp_old)}` is now `--fsdp true --fsdp_config '{json.dumps(fsdp_config)}'`")
    return out, notices, problems


def _given_twice(argv: list[str]) -> list[str]:
    """["--seed", "1", "--seed", "2"] -> ["--seed is given 2 times: the last one counts, `--seed 2`"]"""
    given: dict[str, list[list[str]]] = {}
    for name, values in _split_into_flags(argv):
        given.setdefault(name, []).append(values)
    return [
        f"--{name} is given {len(values)} times: the last one counts, `{_quoted(name, values[-1])}`"
        for name, values in given.items()
        if name and any(value != values[-1] for value in values)
    ]


def _today(name: str, values: list[str]) -> tuple[list[str], str]:
    """One flag in today's words, and what to print about it. A ValueError says what to do where there are none."""
    new = [f"--{name}", *values] if name else values
    if name in GONE:
        raise ValueError(f"`--{name}` no longer exists: {GONE[name]}. Remove the flag.")
    if name == "warmup_ratio" and not (values and _is_ratio(values[0])):
        raise ValueError("a ratio lies between 0 and 1. For a number of steps use --warmup_steps.")
    if name == "save_safetensors" and values and not is_true(values[0]):
        raise ValueError("models are always saved as safetensors, never as pickles. Remove the flag.")
    if name == "logging_dir" and values:
        os.environ["TENSORBOARD_LOGGING_DIR"] = values[0]
        return [], "is now the environment variable TENSORBOARD_LOGGING_DIR (set for this run)"
    if name == "group_by_length" and (not values or is_true(values[0])):
        new = ["--train_sampling_strategy", "group_by_length"]
    elif name in ("group_by_length", "save_safetensors", "include_tokens_per_second"):
        return [], "is no longer needed"  # tokens per second are on every logged line
    elif name in RENAMED:
        new = [f"--{RENAMED[name]}", *values]
    else:
        return new, ""
    return new, f"is now `{_quoted(new[0][2:], new[1:])}`"


def _fsdp_words(words: list[str]) -> dict[str, object]:
    unknown = [word for word in words if word not in FSDP_WORDS]
    if unknown:
        raise ValueError(f"FSDP2 has no {unknown[0]!r}. Known words: {', '.join(FSDP_WORDS)}.")
    config: dict[str, object] = {"reshard_after_forward": "shard_grad_op" not in words}
    asked = {"offload": "cpu_offload", "hybrid_shard": "hybrid_shard"}
    return config | {name: True for word, name in asked.items() if word in words}


def read_json(flag: str, given: str) -> dict:
    """Read a flag's value, JSON or the path of a JSON file. A ValueError with the flag's name says what is wrong."""
    try:
        found = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{flag} {given}: {error.strerror}. Give a JSON file, or the JSON itself in quotes."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {given}: not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{flag} {given}: give a JSON object, such as {{}}.")
    return found


def _split_into_flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """["--a", "1", "--b=2"] -> [("a", ["1"]), ("b", ["2"])]; a leading value without a flag has the name ""."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            flags.append(("", [word]))
    return flags


def names_in(argv: list[str]) -> set[str]:
    return {name for name, _ in _split_into_flags(argv)}


def _quoted(name: str, values: list[str]) -> str:
    """A flag as it is printed, without secrets."""
    values = ["***" if is_secret(name) else without_password(value) for value in values]
    return " ".join([f"--{name}", *(f'"{value}"' if " " in value else value for value in values)])


def _is_ratio(value: str) -> bool:
    try:
        return 0 <= float(value) < 1
    except ValueError:
        return False


TYPED = {  # what people type -> what is meant; letters' distance would choose worse
    word: meant
    for meant, words in {
        "learning_rate": "lr",
        "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size",
        "per_device_eval_batch_size": "eval_batch_size",
        "gradient_accumulation_steps": "accumulation_steps grad_accum",
        "num_train_epochs": "epochs num_epochs",
        "max_steps": "steps",
        "use_lora": "lora",
        "lora_r": "lora_rank",
        "load_in_4bit": "qlora",
        "model_name_or_path": "model model_name model_path base_model",
        "data_path": "data dataset train_file",
        "eval_data_path": "validation_file",
        "output_dir": "output",
        "model_max_length": "max_length max_seq_length cutoff_len",
        "warmup_steps": "warmup",
        "lr_scheduler_type": "lr_schedular lr_scheduler scheduler",
        "optim": "optimizer",
        "resume_from_checkpoint": "resume",
        "use_cpu": "cpu",
    }.items()
    for word in words.split()
}
LAUNCHERS = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "num_processes", "num_gpus")


def unknown_flags(known: transformers.HfArgumentParser, words: list[str]) -> list[str]:
    """One problem for each word that `parse_known_args` left over, with the nearest flag there is."""
    flags = [word for word in words if word.startswith("-")]
    if not flags:
        return [f"{word!r} belongs to no flag. A value with spaces needs quotes." for word in words]
    return [_unknown_flag(known, word) for word in flags]


def _unknown_flag(known: transformers.HfArgumentParser, word: str) -> str:
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    if name in LAUNCHERS:
        return f"--{name} is the launcher's flag. Write it before the script: torchrun --{name} … llama_training.py …"
    options = [option.lstrip("-") for option in known._option_string_actions if "-" not in option.lstrip("-")]
    meant = TYPED.get(name)
    near = [meant] if meant in options else [option for option in options if option.startswith(name)]
    near = near or difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"unknown flag --{name}." + (f" Did you mean --{near[0]}?" if near else " `--help` lists every flag.")
