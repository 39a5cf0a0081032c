"""The flags of 2023, translated to today's."""

import json
import os
from pathlib import Path

import transformers

RENAMED = {  # transformers 4.31 -> 5.x, and two misspellings of the original README's parameter table
    "evaluation_strategy": "eval_strategy",
    "num_training_epochs": "num_train_epochs",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
}
WRAP_CLASS = ("fsdp_transformer_layer_cls_to_wrap", "fsdp_transformer_later_cls_to_wrap")
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


def _is_true(value: str) -> bool:
    return transformers.hf_argparser.string_to_bool(value)


def translate(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Rewrite the flags of 2023 as today's.

    ["--evaluation_strategy", "no"] -> ["--eval_strategy", "no"] and "`--evaluation_strategy no` is now `--eval_strategy no`"

    Returns: the arguments to parse, one notice for each change, and the problems (a value that has no translation).
    """
    flags = _split_into_flags(argv)
    out, notices, problems = [], [], []
    fsdp_config: dict[str, object] = {}
    fsdp_old: list[str] = []

    for name, values in flags:
        old = " ".join([f"--{name}", *(value if " " not in value else f'"{value}"' for value in values)]).strip()
        new: list[str] | None = None
        if name in RENAMED:
            if name == "warmup_ratio" and not (values and _is_ratio(values[0])):
                problems.append(f"`{old}`: a ratio lies between 0 and 1. For a number of steps use --warmup_steps.")
                continue
            new = [f"--{RENAMED[name]}", *values]
        elif name in WRAP_CLASS and values:
            fsdp_config["transformer_layer_cls_to_wrap"] = values
            fsdp_old.append(old)
            continue
        elif name == "fsdp" and values and values[0].lower() not in ("true", "false"):
            words = " ".join(values).split()
            known = {"full_shard": True, "shard_grad_op": False}
            unknown = [word for word in words if word not in (*known, "auto_wrap", "offload")]
            if unknown:
                problems.append(
                    f"`{old}`: FSDP2 has no {unknown[0]!r}. Known words: full_shard, shard_grad_op, auto_wrap, offload."
                )
                continue
            fsdp_config["reshard_after_forward"] = all(known.get(word, True) for word in words)
            if "offload" in words:
                fsdp_config["cpu_offload"] = True
            fsdp_old.insert(0, old)
            continue
        elif name == "group_by_length":
            wanted = not values or _is_true(values[0])
            new = ["--train_sampling_strategy", "group_by_length"] if wanted else []
        elif name == "include_tokens_per_second":
            new = []  # tokens per second are on every logged line
        elif name == "save_safetensors":
            if values and not _is_true(values[0]):
                problems.append(f"`{old}`: models are always saved as safetensors, never as pickles. Remove the flag.")
                continue
            new = []
        elif name == "logging_dir" and values:
            os.environ["TENSORBOARD_LOGGING_DIR"] = values[0]
            notices.append(f"`{old}` is now the environment variable TENSORBOARD_LOGGING_DIR (set for this run)")
            continue
        elif name in GONE:
            problems.append(f"`--{name}` no longer exists: {GONE[name]}. Remove the flag.")
            continue

        if new is None:
            out += [f"--{name}", *values] if name else values
        else:
            out += new
            notices.append(f"`{old}` is now `{' '.join(new)}`" if new else f"`{old}` is no longer needed")

    if fsdp_old:
        given = _value_of(out, "fsdp_config")
        if given is not None and Path(given).is_file():
            given = Path(given).read_text(encoding="utf-8")
        try:
            # one rank reads the checkpoint into host memory and hands the others their shards
            defaults = {"version": 2, "cpu_ram_efficient_loading": True}
            merged = {**defaults, **fsdp_config, **json.loads(given or "{}")}
        except ValueError as error:
            return out, notices, [*problems, f"--fsdp_config {given}: neither a JSON file nor JSON ({error})."]
        out = [*_without(out, "fsdp_config"), "--fsdp", "true", "--fsdp_config", json.dumps(merged)]
        notices.append(f"`{' '.join(fsdp_old)}` is now `--fsdp true --fsdp_config '{json.dumps(merged)}'`")
    return out, notices, problems


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


def _is_ratio(value: str) -> bool:
    try:
        return 0 <= float(value) < 1
    except ValueError:
        return False


def _value_of(argv: list[str], name: str) -> str | None:
    return next((values[-1] for flag, values in reversed(_split_into_flags(argv)) if flag == name and values), None)


def _without(argv: list[str], name: str) -> list[str]:
    return [w for flag, values in _split_into_flags(argv) if flag != name for w in (f"--{flag}", *values)]
