"""Check a DeepSpeed file against the flags, before any weight is loaded.

DeepSpeed answers some mistakes with an assertion after minutes of loading, and others not at all: a `scheduler` block
moves the learning rate, a missing `gradient_clipping` turns `--max_grad_norm` off, a misspelt key does nothing.
"""

import difflib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from sft.job import say, world_size

# The top-level keys that deepspeed 0.19.8 reads (runtime/config.py, runtime/constants.py and the configs it imports).
# There is no list of them in DeepSpeed; a test compares this one with its sources.
TOP_LEVEL_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "managed_gradient_accumulation", "optimizer", "zero_optimization", "bf16", "fp16", "torch_autocast", "data_types",
    "communication_data_type", "seq_parallel_communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather", "disable_python_gc",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "dataloader_drop_last", "log_level", "checkpoint", "activation_checkpointing",
    "aio", "flops_profiler", "comms_logger", "tensorboard", "wandb", "comet", "csv_monitor", "autotuning", "compile",
    "pipeline", "hybrid_engine", "data_efficiency", "weight_quantization", "use_data_before_expert_parallelism",
    "tensor_parallel", "expert_parallel", "sequence_parallel_size", "vocabulary_size", "timers", "datastates_ckpt",
)  # fmt: skip
# Keys of older files, and what to write in their place. DeepSpeed 0.19.8 stops at some of them; others it takes, and
# transformers and Accelerate read the new name alone: they would train with another optimizer or another number type.
OLD_KEYS = {
    "bfloat16": '"bf16": {"enabled": "auto"}',
    "amp": '"bf16": {"enabled": "auto"}',
    "fp32_allreduce": '"communication_data_type": "fp32"',
    "zero_optimization.cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": '"offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_params": '"offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": '"pin_memory": true in "offload_optimizer"',
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": '"stage3_gather_16bit_weights_on_model_save": true',
} | dict.fromkeys(
    ("nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
     "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"), ""
)  # fmt: skip
# Optimizers that accelerate 1.15 (utils/deepspeed.py, map_pytorch_optim_to_deepspeed) replaces by the same algorithm on
# the CPU. Any other becomes Adam with L2 regularisation instead of decoupled weight decay, without a word.
KEPT_WHEN_OFFLOADED = ("adamw_torch", "adamw_torch_fused", "adagrad")
# Numbers that the Trainer fills in from the model's width (transformers 5.23, integrations/deepspeed.py)
FILLED_IN = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


class Finding(NamedTuple):
    """One thing to know about a DeepSpeed file.

    error: the run cannot start, or what it trains or saves would not be what was asked. warning: the file wins over a
    flag. note: nothing is wrong.
    """

    severity: str
    what: str
    consequence: str
    write: str  # the line that corrects it; "" for a note

    def __str__(self) -> str:
        return f"{self.what}: {self.consequence}." + (f" {self.write}" if self.write else "")


class Unreadable(Exception):
    """A file of which nothing more can be checked: what it is, the consequence, what to write."""


def check_deepspeed(flags) -> list[str]:
    """Print the warnings and notes about `--deepspeed FILE` and return the errors.

    Args:
        flags: an object with the Trainer's arguments as attributes, parsed or not yet built.
    """
    if not flags.deepspeed:
        return []
    findings = lint(flags.deepspeed, flags)
    if "RANK" not in os.environ:  # deepspeed 0.19.8, comm/comm.py: without torchrun's variables it looks for MPI
        start = "Start the script with: torchrun --nproc_per_node=1"
        findings.append(Finding("error", "--deepspeed without torchrun", "DeepSpeed finds no ranks", start))
    for finding in findings:
        if finding.severity != "error":
            say(f"{finding.severity}: {finding}")
    return [str(finding) for finding in findings if finding.severity == "error"]


def read_for_plan(flags) -> list[str]:
    """Replace `--deepspeed FILE` by its content, or return why it cannot be read. DeepSpeed need not be installed."""
    if not flags.deepspeed:
        return []
    try:
        flags.deepspeed = _read(flags.deepspeed)[1]
    except Unreadable as error:
        return [str(Finding("error", *error.args))]
    return []


def lint(file: str | dict, flags) -> list[Finding]:
    """Everything that is known about a DeepSpeed file without starting DeepSpeed, errors first.

    {"zero_optimization": {"stage": "2"}} -> [Finding("error", "…zero_optimization.stage is \"2\"", …)]

    Args:
        file: the path of the file, or its content.
        flags: an object with the Trainer's arguments as attributes.
    """
    try:
        name, config = _read(file)
    except Unreadable as error:
        return [Finding("error", *error.args)]
    if importlib.util.find_spec("deepspeed") is None:
        package = "--deepspeed needs the package deepspeed"
        return [Finding("error", package, "it is not installed", "Run: pip install deepspeed")]
    rows = [*_keys(config), *_differences(config, flags), *_effects(config, flags)]
    findings = [Finding(severity, f"{name}: {what}", *rest) for severity, what, *rest in rows]
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


Row = tuple[str, str, str, str]  # a Finding without the file's name


def _read(file: str | dict) -> tuple[str, dict]:
    """The name to call it in messages, and the content of a path, of JSON on the command line, or of a dict."""
    if not isinstance(file, str):
        name, config = "the DeepSpeed configuration", file
    elif file.lstrip().startswith("{"):
        name, config = "--deepspeed", _parse("--deepspeed", file)
    elif Path(file).is_file():
        name, config = file, _parse(file, Path(file).read_text(encoding="utf-8-sig"))
    else:
        cure = "Give the path of a DeepSpeed file, such as ds_config.json."
        raise Unreadable(f"--deepspeed {file}", "there is no such file", cure)
    blocks = ("zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "bf16")
    for key in (*blocks, "fp16", "optimizer", "optimizer.params", "data_types"):
        block = _get(config, key)
        if not isinstance(block, dict):
            write = f'Write "{key.split(".")[-1]}": {{ … }}.'
            raise Unreadable(f"{name}: {key} is {json.dumps(block)}", "DeepSpeed expects an object there", write)
    stage = _get(config, "zero_optimization").get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:  # DeepSpeed takes "2" and true, transformers does not
        write = f'Write "stage": {stage if stage in list("0123") else 2}'
        what = f"{name}: zero_optimization.stage is {json.dumps(stage)}"
        raise Unreadable(what, "it must be one of the numbers 0, 1, 2, 3", write)
    return name, config


def _parse(name: str, text: str) -> dict:
    def no_key_twice(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                what = f"{name}: {key!r} stands twice in one object"
                raise Unreadable(what, "only the last one would count", "Remove one of them.")
        return dict(pairs)

    try:
        config = json.loads(text, object_pairs_hook=no_key_twice)
    except json.JSONDecodeError as error:
        write = "Correct that line; JSON has no comments and no comma after a last entry."
        where = f"{name}, line {error.lineno}, column {error.colno}"
        raise Unreadable(where, f"this is not JSON ({error.msg})", write) from None
    if not isinstance(config, dict):
        fault = f"it holds a {type(config).__name__}, not an object"
        raise Unreadable(name, fault, 'Write { "zero_optimization": { "stage": 2 } }.')
    return config


def _get(config: dict, path: str) -> Any:
    """A nested value; an empty block where it is missing or null."""
    found: Any = config
    for key in path.split("."):
        if isinstance(found, dict):
            found = {} if found.get(key) is None else found[key]
    return found


def _keys(config: dict) -> Iterator[Row]:
    """Keys that DeepSpeed does not read or no longer reads, and values of the wrong type, by DeepSpeed's own models."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import config as zero
    from pydantic import ValidationError

    for key in config:
        if key in OLD_KEYS:
            yield _old(key)
        elif key not in (*TOP_LEVEL_KEYS, "scheduler"):
            yield "warning", f"unknown key {key!r}", "DeepSpeed ignores it", _nearest(key, TOP_LEVEL_KEYS)
    models: dict[str, Any] = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": zero.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": zero.DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for prefix in ("zero_optimization", "bf16", "fp16"):  # each checks its children
        block = _get(config, prefix)
        old = [key for key in block if f"{prefix}.{key}" in OLD_KEYS]
        yield from (_old(f"{prefix}.{key}") for key in old)
        try:
            models[prefix](**{key: value for key, value in block.items() if key not in old})
        except ValidationError as error:
            for fault in error.errors():
                *parents, key = prefix, *map(str, fault["loc"])
                where = ".".join((*parents, key))
                if fault["type"] == "extra_forbidden":
                    owner = models.get(".".join(parents))
                    known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
                    yield "error", f"unknown key {where!r}", "DeepSpeed refuses it", _nearest(key, known)
                else:
                    write = f'Write "{key}": "auto"' if key in FILLED_IN else "Correct it or remove it."
                    value = json.dumps(fault["input"], default=str)
                    yield "error", f"{where} is {value}", fault["msg"].removeprefix("Value error, "), write


def _old(key: str) -> Row:
    write = f"Write {OLD_KEYS[key]}" if OLD_KEYS[key] else "Remove it."
    return "error", f"old key {key!r}", "this DeepSpeed has another in its place or none", write


def _nearest(key: str, known) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f'Did you mean "{near[0]}"?' if near else "Remove it."


def _differences(config: dict, flags) -> list[Row]:
    """Numbers of the file that a flag gives differently. The Trainer would refuse them when the weights are loaded."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    rows: list[Row] = []
    args = SimpleNamespace(**{**vars(flags), "world_size": world_size()})
    counted = f"{args.world_size} ranks x {args.per_device_train_batch_size} per device x "
    counted += f"{args.gradient_accumulation_steps} accumulation ="

    class Compared(HfTrainerDeepSpeedConfig):
        def fill_match(self, ds_key_long, hf_val, hf_key=None, must_match=True):
            block, key = self.find_config_node(ds_key_long)
            given = "auto" if block is None else block.get(key, "auto")
            if not must_match or given in ("auto", hf_val):
                return
            names = [name for name in hf_key.split("|") if getattr(args, name, hf_val) == hf_val]
            flag = counted if "calculated" in hf_key else "--" + " and --".join(names).replace("+", " and --")
            what = f"{ds_key_long!r} is {json.dumps(given)}, but {flag} {json.dumps(hf_val)}"
            rows.append(("error", what, "they contradict each other", f'Write "{key}": "auto" and the flag decides'))

    Compared({**config, "scheduler": {}}).trainer_config_process(args)
    return rows


def _effects(config: dict, flags) -> list[Row]:
    """What the file as a whole does to the run, and what this machine lacks for it."""
    zero, has = _get(config, "zero_optimization"), config.__contains__
    stage, optim = zero.get("stage", 0), str(getattr(flags.optim, "value", flags.optim))
    scheduler, optimizer = (_get(config, f"{block}.type") or "no type" for block in ("scheduler", "optimizer"))
    waiting = ", ".join(key for key in zero if key == "offload_param" or key.startswith("stage3_"))
    offloads = _get(config, "zero_optimization.offload_optimizer").get("device", "none") != "none"
    compiler = os.environ.get("CXX", "c++")  # torch 2.13, utils/cpp_extension.py, get_cxx_compiler
    missing = [f"a C++ compiler ({compiler})"] * (not shutil.which(compiler)) + ["ninja"] * (not shutil.which("ninja"))
    swapped = not has("optimizer") and config.get("zero_force_ds_cpu_optimizer", True)
    table: list[Any] = [
        (all(_get(config, f"{kind}.enabled") is True for kind in ("bf16", "fp16")),
         "error", "bf16 and fp16 are both enabled", "a run has one compute type",
         'Write "enabled": "auto" in both: the flags --bf16 and --fp16 then decide'),
        # deepspeed 0.19.8, engine.py, get_data_types: with ZeRO the default is the model's type
        ((flags.bf16 or flags.fp16) and _get(config, "data_types.grad_accum_dtype") != "fp32",
         "warning", "data_types.grad_accum_dtype is not fp32",
         "the gradients of a step's micro-batches are summed in 16 bits, and small ones are lost",
         'Write "data_types": {"grad_accum_dtype": "fp32"}'),
        *((not has(key), "error", f"{key!r} is missing", f"DeepSpeed would not follow {flag}", f'Write "{key}": "auto"')
          for key, flag in (("train_micro_batch_size_per_gpu", "--per_device_train_batch_size"),
                            ("gradient_accumulation_steps", "--gradient_accumulation_steps"))),
        (not has("gradient_clipping") and flags.max_grad_norm, "warning", "'gradient_clipping' is missing",
         f"DeepSpeed clips nothing and --max_grad_norm {flags.max_grad_norm} has no effect",
         'Write "gradient_clipping": "auto"'),
        (has("scheduler"), "error", f"a scheduler block ({scheduler})",
         "the learning rate that is used would not be the one that is printed",
         'Remove the block "scheduler": --lr_scheduler_type decides'),
        (has("optimizer"), "warning", f"the optimizer block ({optimizer}) overrides --optim {optim}",
         "the file's optimizer is used", 'Remove the block "optimizer" and the flag decides'),
        (stage == 0, "warning", "ZeRO stage 0",
         "DeepSpeed shards nothing, every GPU holds everything", 'Write "stage": 2'),
        (stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True,
         "error", "stage 3 without stage3_gather_16bit_weights_on_model_save",
         "the weights lie in pieces on the ranks and no usable model would be saved",
         'Write "stage3_gather_16bit_weights_on_model_save": true'),
        (stage != 3 and waiting, "note", waiting, f'no effect at stage {stage}, they wait for "stage": 3', ""),
        (offloads and missing, "error",
         f"offload_optimizer compiles DeepSpeed's CPU Adam, which needs {' and '.join(missing)}",
         "not found on this machine", 'Run: apt install g++ ninja-build, or remove "offload_optimizer"'),
        (offloads and swapped and optim not in KEPT_WHEN_OFFLOADED, "error",
         f"offload_optimizer with --optim {optim}",
         "an offloaded optimizer is DeepSpeed's CPU Adam, with L2 regularisation for this --optim",
         'Use --optim adamw_torch, or remove "offload_optimizer"'),
    ]  # fmt: skip
    return [(severity, what, *rest) for applies, severity, what, *rest in table if applies]
