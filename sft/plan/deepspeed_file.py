"""Check a DeepSpeed file against the flags, before any weight is loaded.

DeepSpeed answers some mistakes with an assertion after minutes of loading, and others not at all: a `scheduler` block
moves the learning rate, a missing `gradient_clipping` turns `--max_grad_norm` off, a misspelt key does nothing.
"""

import difflib
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from sft.job import say, world_size
from sft.outside import counted

# The top-level keys that deepspeed 0.19.8 reads (runtime/config.py, runtime/constants.py and the configs it imports).
# There is no list of them in DeepSpeed; a test compares this one with its sources.
TOP_LEVEL_KEYS = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    managed_gradient_accumulation optimizer zero_optimization bf16 fp16 torch_autocast data_types
    communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor
    gradient_allreduce_op disable_allgather disable_python_gc zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    steps_per_print wall_clock_breakdown memory_breakdown dump_state dataloader_drop_last log_level checkpoint
    activation_checkpointing aio flops_profiler comms_logger tensorboard wandb comet csv_monitor autotuning compile
    pipeline hybrid_engine data_efficiency weight_quantization use_data_before_expert_parallelism tensor_parallel
    expert_parallel sequence_parallel_size vocabulary_size timers datastates_ckpt
""".split()
# Keys of older files, and what to write in their place. DeepSpeed 0.19.8 stops at some of them; others it takes, and
# transformers and Accelerate read the new name alone: they would train with another optimizer or another number type.
OLD_KEYS = {
    "bfloat16": '"bf16": {"enabled": "auto"}',
    "amp": '"bf16": {"enabled": "auto"}',
    "allreduce_always_fp32": '"communication_data_type": "fp32"',
    "allgather_size": '"allgather_bucket_size": 500000000 in "zero_optimization"',
    "load_universal_checkpoint": '"checkpoint": {"load_universal": true}',
    "loss_scale": '"fp16": {"enabled": "auto"}',
    "max_grad_norm": '"gradient_clipping": "auto"',
    "train_step_batch_size": '"train_batch_size": "auto"',
    "use_node_local_storage": '"checkpoint": {"use_node_local_storage": true}',
    "zero_stage": '"zero_optimization": {"stage": 2}',
    "zero_optimization.allgather_size": '"allgather_bucket_size": 500000000',
    "zero_optimization.gather_fp16_weights_on_model_save": '"stage3_gather_16bit_weights_on_model_save": true',
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
# Objects inside the file
BLOCKS = ("zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "bf16", "fp16",
          "optimizer", "optimizer.params", "data_types")  # fmt: skip


class Finding(NamedTuple):
    """One thing to know about a DeepSpeed file."""

    severity: str  # error: the run cannot start, or would train or save something else; warning: a flag loses; or note
    what: str
    consequence: str
    write: str  # what corrects it; "" for a note

    def __str__(self) -> str:
        return f"{self.what}: {self.consequence}. {self.write}".rstrip()


class Unreadable(Exception):
    """A file of which nothing more can be checked; its argument is the Finding."""

    def __init__(self, *finding: str):
        super().__init__(Finding("error", *finding))


def check_deepspeed(flags) -> list[str]:
    """Print the warnings and notes about `--deepspeed FILE` and return the errors."""
    if not flags.deepspeed:
        return []
    findings = [*_left_locks(), *lint(flags.deepspeed, flags)]
    if "RANK" not in os.environ:  # deepspeed 0.19.8, comm/comm.py: without torchrun's variables it looks for MPI
        start = "Start the script with: torchrun --nproc_per_node=1"
        findings.append(Finding("error", "--deepspeed without torchrun", "DeepSpeed finds no ranks", start))
    for finding in findings:
        if finding.severity != "error":
            say(f"{finding.severity}: {finding}")
    return [str(finding) for finding in findings if finding.severity == "error"]


def lint(file: str | dict, flags) -> list[Finding]:
    """Everything that is known about a DeepSpeed file, or its content, without starting DeepSpeed, errors first.

    {"zero_optimization": {"stage": "2"}} -> [Finding("error", "…zero_optimization.stage is \"2\"", …)]
    """
    try:
        name, config = read(file)
        if importlib.util.find_spec("deepspeed") is None:
            package = "--deepspeed needs the package deepspeed"
            raise Unreadable(package, "it is not installed", "Run: pip install deepspeed")
    except Unreadable as error:
        return [error.args[0]]
    findings = [*_keys(config), *_differences(config, flags), *_effects(config, flags)]
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.severity))
    return [finding._replace(what=f"{name}: {finding.what}") for finding in findings]


def read(file: str | dict) -> tuple[str, dict]:
    """What to call it in messages, and the content: of a path, of JSON on the command line, or of a dict."""
    name, config = "the DeepSpeed configuration", cast(dict, file)

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
        for key, times in Counter(key for key, _ in pairs).items():
            if times > 1:
                what = f"{name}: {key!r} stands twice in one object"
                raise Unreadable(what, "only the last one would count", "Remove one of them.")
        return dict(pairs)

    if isinstance(file, str):
        inline = file.lstrip().startswith("{")
        name = "--deepspeed" if inline else file
        if not inline and not Path(file).is_file():
            cure = "Give the path of a DeepSpeed file, such as ds_config.json."
            raise Unreadable(f"--deepspeed {file}", "there is no such file", cure)
        try:
            text = file if inline else Path(file).read_text(encoding="utf-8-sig")
            config = json.loads(text, object_pairs_hook=no_key_twice)
        except json.JSONDecodeError as error:
            where = f"{name}, line {error.lineno}, column {error.colno}"
            write = "Correct that line; JSON has no comments and no comma after a last entry."
            raise Unreadable(where, f"this is not JSON ({error.msg})", write) from None
        except (OSError, ValueError, RecursionError) as error:
            raise Unreadable(name, f"it cannot be read ({error})", "Give a text file that holds JSON.") from None
    for key in ("", *BLOCKS):
        if not isinstance(_get(config, key), dict):
            what = f"{name}: {key or 'it'} is {json.dumps(_get(config, key))}"
            inside = '"stage": 2' if key == "zero_optimization" else "…"  # true, in files of 2020, was stage 1
            write = f'Write "{key.split(".")[-1]}": {{{inside}}}.' if key else "Write { … }."
            raise Unreadable(what, "DeepSpeed expects an object there", write)
    stage = _get(config, "zero_optimization").get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:  # DeepSpeed takes "2" and true, transformers does not
        what = f"{name}: zero_optimization.stage is {json.dumps(stage)}"
        write = f'Write "stage": {stage if stage in list("0123") else 2}'
        raise Unreadable(what, "it must be one of the numbers 0, 1, 2, 3", write)
    return name, config


def _left_locks() -> Iterator[Finding]:
    """Locks of builds that were killed: PyTorch (2.13, utils/file_baton.py) waits for their removal, without a word and for ever."""
    from torch.utils.cpp_extension import get_default_build_root

    def made_at(lock: Path) -> int | None:
        return lock.stat().st_mtime_ns if lock.exists() else None

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = {lock: made_at(lock) for lock in root.rglob("lock")}
    open_files: set[str] = set()  # who builds keeps its lock open
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # another user's process, or one that has just ended
            open_files.add(os.readlink(link))
    for lock in sorted(locks) if open_files else ():  # where there is no /proc nothing is known
        # one that was released meanwhile is gone, or another one
        if str(lock.resolve()) not in open_files and locks[lock] and made_at(lock) == locks[lock]:
            what = f"{lock}: left by a process that was killed while it compiled {lock.parent.name} for DeepSpeed"
            cure = "Remove that file. If another machine that shares the folder compiles there now, wait for it."
            yield Finding("error", what, "this run would wait for it for ever", cure)


def _get(config: Any, path: str) -> Any:
    """A nested value; an empty block where it is missing or null."""
    for key in filter(None, path.split(".")):
        if isinstance(config, dict):
            config = {} if config.get(key) is None else config[key]
    return config


def _keys(config: dict) -> Iterator[Finding]:
    """Keys that DeepSpeed does not read or no longer reads, and values of the wrong type, by DeepSpeed's own models."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import config as zero
    from pydantic import ValidationError

    models = {"zero_optimization": zero.DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    inner = zero.DeepSpeedZeroOffloadOptimizerConfig, zero.DeepSpeedZeroOffloadParamConfig
    known = [f.alias or name for model in (*models.values(), *inner) for name, f in model.model_fields.items()]
    for key in (*config, *(f"{block}.{key}" for block in models for key in _get(config, block))):
        if key in OLD_KEYS:
            write = f"Write {OLD_KEYS[key]}" if OLD_KEYS[key] else "Remove it."
            yield Finding("error", f"old key {key!r}", "this DeepSpeed has another in its place or none", write)
        elif key in config and key not in (*TOP_LEVEL_KEYS, "scheduler"):
            yield Finding("warning", f"unknown key {key!r}", "DeepSpeed ignores it", _nearest(key, TOP_LEVEL_KEYS))
    for block, model in models.items():  # each checks its children
        try:
            model(**{key: value for key, value in _get(config, block).items() if f"{block}.{key}" not in OLD_KEYS})
        except ValidationError as error:
            for fault in error.errors():
                path = [block, *map(str, fault["loc"])]
                where, key = ".".join(path), path[-1]
                if fault["type"] == "extra_forbidden":
                    yield Finding("error", f"unknown key {where!r}", "DeepSpeed refuses it", _nearest(key, known))
                else:
                    what = f"{where} is {json.dumps(fault['input'], default=str)}"
                    consequence = fault["msg"].removeprefix("Value error, ")
                    yield Finding("error", what, consequence, "Correct it or remove it.")


def _nearest(key: str, known) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f'Did you mean "{near[0]}"?' if near else "Remove it."


def _differences(config: dict, flags) -> Iterator[Finding]:
    """Numbers of the file that a flag gives differently. The Trainer would refuse them when the weights are loaded."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    args = SimpleNamespace(**{**vars(flags), "world_size": world_size()})
    product = f"{counted(args.world_size, 'rank')} x {args.per_device_train_batch_size} per device x "
    product += f"{args.gradient_accumulation_steps} accumulation ="
    compared = HfTrainerDeepSpeedConfig({**config, "scheduler": {}})
    compared.trainer_config_process(args)
    for line in compared.mismatches:  # "- ds fp16.enabled=True vs hf fp16|fp16_full_eval=False"
        (key, given), (names, value) = (part.split("=", 1) for part in line.removeprefix("- ds ").split(" vs hf "))
        flag = product if "calculated" in names else "--" + names.split("|")[0].replace("+", " and --")
        write = f'Write "{key.split(".")[-1]}": "auto" and the flag decides'
        yield Finding("error", f"{key!r} is {given}, but {flag} {value}", "they contradict each other", write)


def _effects(config: dict, flags) -> list[Finding]:
    """What the file as a whole does to the run, and what this machine lacks for it."""
    zero, has = _get(config, "zero_optimization"), config.__contains__
    stage, optim = zero.get("stage", 0), str(getattr(flags.optim, "value", flags.optim))
    scheduler, optimizer = (_get(config, f"{block}.type") or "no type" for block in ("scheduler", "optimizer"))
    waiting = ", ".join(key for key in zero if key == "offload_param" or key.startswith("stage3_"))
    offloads = _get(config, "zero_optimization.offload_optimizer").get("device", "none") != "none"
    compiler = os.environ.get("CXX", "c++")  # torch 2.13, utils/cpp_extension.py, get_cxx_compiler
    tools = {f"a C++ compiler ({compiler})": compiler, "ninja": "ninja"}
    missing = " and ".join(tool for tool, command in tools.items() if not shutil.which(command))
    swapped = not has("optimizer") and config.get("zero_force_ds_cpu_optimizer", True)
    table: list[tuple] = [
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
        (stage == 0, "warning", "ZeRO stage 0", "DeepSpeed shards nothing, every GPU holds everything", 'Write "stage": 2'),
        (stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True,
         "error", "stage 3 without stage3_gather_16bit_weights_on_model_save",
         "the weights lie in pieces on the ranks and no usable model would be saved",
         'Write "stage3_gather_16bit_weights_on_model_save": true'),
        (stage != 3 and waiting, "note", waiting, f'no effect at stage {stage}, they wait for "stage": 3', ""),
        (offloads and missing, "error", f"offload_optimizer compiles DeepSpeed's CPU Adam, which needs {missing}",
         "not found on this machine", 'Run: apt install g++ ninja-build, or remove "offload_optimizer"'),
        (offloads and swapped and optim not in KEPT_WHEN_OFFLOADED, "error", f"offload_optimizer with --optim {optim}",
         "an offloaded optimizer is DeepSpeed's CPU Adam, with L2 regularisation for this --optim",
         'Use --optim adamw_torch, or remove "offload_optimizer"'),
    ]  # fmt: skip
    return [Finding(*finding) for applies, *finding in table if applies]
