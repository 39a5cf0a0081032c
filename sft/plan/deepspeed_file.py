"""What a DeepSpeed file will do, said before any weight is loaded.

DeepSpeed answers some mistakes with an assertion after minutes of loading and others not at all: a `scheduler` block
replaces `--lr_scheduler_type`, a missing `gradient_clipping` turns `--max_grad_norm` off, a misspelt key does nothing.
"""

import difflib
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sft.job import say, world_size

# The top-level keys that deepspeed 0.19.8 reads (runtime/config.py, runtime/constants.py and the configs it imports).
# There is no list of them in DeepSpeed; a test compares this one with its sources.
TOP_LEVEL_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "managed_gradient_accumulation", "optimizer", "scheduler", "zero_optimization", "bf16", "bfloat16", "fp16",
    "torch_autocast", "data_types", "communication_data_type", "seq_parallel_communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather",
    "disable_python_gc", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "dataloader_drop_last", "log_level", "checkpoint",
    "activation_checkpointing", "aio", "flops_profiler", "comms_logger", "tensorboard", "wandb", "comet",
    "csv_monitor", "autotuning", "compile", "pipeline", "hybrid_engine", "data_efficiency", "weight_quantization",
    "use_data_before_expert_parallelism", "tensor_parallel", "expert_parallel", "sequence_parallel_size",
    "vocabulary_size", "timers", "datastates_ckpt",
)  # fmt: skip


# Optimizers that accelerate 1.15 (utils/deepspeed.py, map_pytorch_optim_to_deepspeed) replaces by the same algorithm on
# the CPU. Any other becomes Adam with L2 regularisation instead of decoupled weight decay, without a word.
KEPT_WHEN_OFFLOADED = ("adamw_torch", "adamw_torch_fused", "adagrad")


@dataclass(frozen=True)
class Finding:
    """One thing to know about a DeepSpeed file.

    error: the run cannot start, or what it trains or saves would not be what was asked. warning: the file wins over a
    flag. note: nothing is wrong.
    """

    severity: str
    what: str
    consequence: str
    write: str  # the line that mends it; "" for a note

    def __str__(self) -> str:
        return f"{self.what}: {self.consequence}." + (f" {self.write}" if self.write else "")


def check_deepspeed(flags) -> list[str]:
    """Say the warnings and notes about `--deepspeed FILE` and return the errors.

    Args:
        flags: an object with the Trainer's arguments as attributes, parsed or not yet built.
    """
    if not flags.deepspeed:
        return []
    findings = lint(flags.deepspeed, flags)
    if "RANK" not in os.environ:
        # deepspeed 0.19.8, comm/comm.py: without torchrun's variables it looks for MPI
        findings.append(
            Finding(
                "error",
                "--deepspeed without torchrun",
                "DeepSpeed finds no ranks",
                "Start the script with: torchrun --nproc_per_node=1",
            )
        )
    for finding in findings:
        if finding.severity != "error":
            say(f"{finding.severity}: {finding}")
    return [str(finding) for finding in findings if finding.severity == "error"]


def read_for_plan(flags) -> list[str]:
    """Put the content of `--deepspeed FILE` in its place, or return why it cannot be read. DeepSpeed need not be installed."""
    if not flags.deepspeed:
        return []
    name, config = _open(flags.deepspeed)
    findings = [config] if isinstance(config, Finding) else _shape(name, config)
    if not findings:
        flags.deepspeed = config
    return [str(finding) for finding in findings]


def lint(file: str | dict, flags) -> list[Finding]:
    """Everything that is known about a DeepSpeed file without starting DeepSpeed, errors first.

    {"zero_optimization": {"stage": "2"}} -> [Finding("error", "…zero_optimization.stage is \"2\"", …)]

    Args:
        file: the path of the file, or its content.
        flags: an object with the Trainer's arguments as attributes.
    """
    name, config = _open(file)
    if isinstance(config, Finding):
        return [config]
    if importlib.util.find_spec("deepspeed") is None:
        return [
            Finding(
                "error", "--deepspeed needs the package deepspeed", "it is not installed", "Run: pip install deepspeed"
            )
        ]
    wrong_shape = _shape(name, config)
    if wrong_shape:
        return wrong_shape
    findings = [
        *_unknown_keys(name, config),
        *_precision(name, config, flags),
        *_against_flags(name, config, flags),
        *_blocks_that_win(name, config, flags),
        *_stage(name, config),
        *_offload(name, config, flags),
    ]
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def _open(file: str | dict) -> tuple[str, dict | Finding]:
    """The name to call it in messages, and the content of a path, of JSON on the command line, or of a dict."""
    if not isinstance(file, str):
        return "the DeepSpeed configuration", file
    if file.lstrip().startswith("{"):
        return "--deepspeed", _parse("--deepspeed", file)
    if not Path(file).is_file():
        cure = "Give the path of a DeepSpeed file, such as ds_config.json."
        return file, Finding("error", f"--deepspeed {file}", "there is no such file", cure)
    return file, _parse(file, Path(file).read_text(encoding="utf-8-sig"))


def _parse(name: str, text: str) -> dict | Finding:
    twice: list[str] = []

    def no_key_twice(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        twice.extend(key for key in dict.fromkeys(keys) if keys.count(key) > 1)
        return dict(pairs)

    try:
        config = json.loads(text, object_pairs_hook=no_key_twice)
    except json.JSONDecodeError as error:
        return Finding(
            "error",
            f"{name}, line {error.lineno}, column {error.colno}",
            f"this is not JSON ({error.msg})",
            "Mend that line; JSON has no comments and no comma after a last entry.",
        )
    if not isinstance(config, dict):
        return Finding(
            "error",
            name,
            f"it holds a {type(config).__name__}, not an object",
            'Write { "zero_optimization": { "stage": 2 } }.',
        )
    if twice:
        return Finding(
            "error",
            f"{name}: {twice[0]!r} stands twice in one object",
            "only the last one would count",
            "Remove one of them.",
        )
    return config


def _shape(name: str, config: dict) -> list[Finding]:
    """Blocks that are no objects, and a stage or a bucket that is no number, end the lint: the rest reads them."""
    zero = config.get("zero_optimization", {})
    blocks = {
        key: config.get(key, {})
        for key in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types")
    }
    if isinstance(zero, dict):
        blocks |= {f"zero_optimization.{key}": zero.get(key) or {} for key in ("offload_optimizer", "offload_param")}
    findings = [
        Finding(
            "error",
            f"{name}: {key} is {json.dumps(block)}",
            "DeepSpeed expects an object there",
            f'Write "{key.split(".")[-1]}": {{ … }}.',
        )
        for key, block in blocks.items()
        if not isinstance(block, dict)
    ]
    if not findings:
        stage = zero.get("stage", 0)
        if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= 3:
            digits = str(stage).strip()
            wanted = digits if digits in ("0", "1", "2", "3") else "2"
            findings.append(
                Finding(
                    "error",
                    f"{name}: zero_optimization.stage is {json.dumps(stage)}",
                    "it must be one of the numbers 0, 1, 2, 3",
                    f'Write "stage": {wanted}',
                )
            )
        bucket = zero.get("reduce_bucket_size", "auto")
        if bucket != "auto" and (isinstance(bucket, bool) or not isinstance(bucket, int | float) or bucket <= 0):
            where = f"{name}: zero_optimization.reduce_bucket_size is {json.dumps(bucket)}"
            cure = 'Write "reduce_bucket_size": "auto"'
            findings.append(Finding("error", where, 'it must be a number above 0, or "auto"', cure))
    return findings


def _unknown_keys(name: str, config: dict) -> list[Finding]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    zero = config.get("zero_optimization", {})
    findings = [
        Finding("warning", f"{name}: unknown key {key!r}", "DeepSpeed ignores it", _nearest(key, TOP_LEVEL_KEYS))
        for key in config
        if key not in TOP_LEVEL_KEYS
    ]
    # DeepSpeed's pydantic models forbid any other key.
    for prefix, block, model in (
        ("bf16", config.get("bf16", {}), DeepSpeedBF16Config),
        ("fp16", config.get("fp16", {}), DeepSpeedFP16Config),
        ("zero_optimization", zero, DeepSpeedZeroConfig),
        (
            "zero_optimization.offload_optimizer",
            zero.get("offload_optimizer") or {},
            DeepSpeedZeroOffloadOptimizerConfig,
        ),
        ("zero_optimization.offload_param", zero.get("offload_param") or {}, DeepSpeedZeroOffloadParamConfig),
    ):
        known = {field.alias or field_name for field_name, field in model.model_fields.items()} | set(
            model.model_fields
        )
        findings += [
            Finding("error", f"{name}: unknown key {f'{prefix}.{key}'!r}", "DeepSpeed refuses it", _nearest(key, known))
            for key in block
            if key not in known
        ]
    return findings


def _nearest(key: str, known) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f'Did you mean "{near[0]}"?' if near else "Remove it."


def _precision(name: str, config: dict, flags) -> list[Finding]:
    both = [config.get(kind, {}).get("enabled") is True for kind in ("bf16", "fp16")]
    if all(both):
        return [
            Finding(
                "error",
                f"{name}: bf16 and fp16 are both enabled",
                "a run has one compute type",
                'Write "enabled": "auto" in both: the flags --bf16 and --fp16 then decide',
            )
        ]
    if (flags.bf16 or flags.fp16) and config.get("data_types", {}).get("grad_accum_dtype") != "fp32":
        # deepspeed 0.19.8, engine.py, get_data_types: with ZeRO the default is the model's type
        return [
            Finding(
                "warning",
                f"{name}: data_types.grad_accum_dtype is not fp32",
                "the gradients of a step's micro-batches are summed in 16 bits, and small ones are lost",
                'Write "data_types": {"grad_accum_dtype": "fp32"}',
            )
        ]
    return []


def _against_flags(name: str, config: dict, flags) -> list[Finding]:
    """Numbers written in the file that a flag also sets. The Trainer refuses a run in which they differ."""
    per_device, accumulation = flags.per_device_train_batch_size, flags.gradient_accumulation_steps
    ranks = world_size()
    optimizer = config.get("optimizer", {}).get("params", {})
    pairs = [
        ("train_micro_batch_size_per_gpu", config, "--per_device_train_batch_size", per_device),
        ("gradient_accumulation_steps", config, "--gradient_accumulation_steps", accumulation),
        ("train_batch_size", config, f"{ranks} ranks x {per_device} per device x {accumulation} accumulation =", ranks * per_device * accumulation),
        ("gradient_clipping", config, "--max_grad_norm", flags.max_grad_norm),
        ("enabled", config.get("bf16", {}), "--bf16", flags.bf16),
        ("enabled", config.get("fp16", {}), "--fp16", flags.fp16),
        ("lr", optimizer, "--learning_rate", flags.learning_rate),
        ("weight_decay", optimizer, "--weight_decay", flags.weight_decay),
        ("eps", optimizer, "--adam_epsilon", flags.adam_epsilon),
        ("betas", optimizer, "--adam_beta1 and --adam_beta2", [flags.adam_beta1, flags.adam_beta2]),
    ]  # fmt: skip
    findings = [
        Finding(
            "error",
            f"{name}: {key!r} is {json.dumps(block[key])}, but {flag} {json.dumps(value)}",
            "they contradict each other",
            f'Write "{key}": "auto" and the flag decides',
        )
        for key, block, flag, value in pairs
        if key in block and block[key] not in ("auto", value)
    ]
    for key, flag in (
        ("train_micro_batch_size_per_gpu", "--per_device_train_batch_size"),
        ("gradient_accumulation_steps", "--gradient_accumulation_steps"),
    ):
        if key not in config:
            findings.append(
                Finding(
                    "error",
                    f"{name}: {key!r} is missing",
                    f"DeepSpeed would not follow {flag}",
                    f'Write "{key}": "auto"',
                )
            )
    if "gradient_clipping" not in config and flags.max_grad_norm:
        findings.append(
            Finding(
                "warning",
                f"{name}: 'gradient_clipping' is missing",
                f"DeepSpeed clips nothing and --max_grad_norm {flags.max_grad_norm} has no effect",
                'Write "gradient_clipping": "auto"',
            )
        )
    return findings


def _blocks_that_win(name: str, config: dict, flags) -> list[Finding]:
    findings = []
    if "scheduler" in config:
        kind = config["scheduler"].get("type", "a scheduler")
        findings.append(
            Finding(
                "warning",
                f"{name}: the scheduler block ({kind}) overrides --lr_scheduler_type {_text(flags.lr_scheduler_type)}",
                "the learning rate follows the file",
                'Remove the block "scheduler" and the flags decide',
            )
        )
    if "optimizer" in config:
        kind = config["optimizer"].get("type", "an optimizer")
        findings.append(
            Finding(
                "warning",
                f"{name}: the optimizer block ({kind}) overrides --optim {_text(flags.optim)}",
                "the file's optimizer is used",
                'Remove the block "optimizer" and the flag decides',
            )
        )
    return findings


def _text(choice) -> str:
    return str(getattr(choice, "value", choice))


def _stage(name: str, config: dict) -> list[Finding]:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    gather = zero.get(
        "stage3_gather_16bit_weights_on_model_save", zero.get("stage3_gather_fp16_weights_on_model_save", False)
    )
    findings = []
    if stage == 0:
        findings.append(
            Finding(
                "warning",
                f"{name}: ZeRO stage 0",
                "DeepSpeed shards nothing, every GPU holds everything",
                'Write "stage": 2',
            )
        )
    if stage == 3 and gather is not True:
        findings.append(
            Finding(
                "error",
                f"{name}: stage 3 without stage3_gather_16bit_weights_on_model_save",
                "the weights lie in pieces on the ranks and no usable model would be saved",
                'Write "stage3_gather_16bit_weights_on_model_save": true',
            )
        )
    waiting = [key for key in zero if key == "offload_param" or key.startswith("stage3_")]
    if stage != 3 and waiting:
        findings.append(
            Finding(
                "note", f"{name}: {', '.join(waiting)}", f'no effect at stage {stage}, they wait for "stage": 3', ""
            )
        )
    return findings


def _offload(name: str, config: dict, flags) -> list[Finding]:
    zero = config.get("zero_optimization", {})
    if (zero.get("offload_optimizer") or {}).get("device", "none") == "none":
        return []
    findings = []
    compiler = os.environ.get("CXX", "c++")  # torch 2.13, utils/cpp_extension.py, get_cxx_compiler
    missing = [] if shutil.which(compiler) else [f"a C++ compiler ({compiler})"]
    if not shutil.which("ninja"):
        missing.append("ninja")
    if missing:
        findings.append(
            Finding(
                "error",
                f"{name}: offload_optimizer compiles DeepSpeed's CPU Adam, which needs {' and '.join(missing)}",
                "not found on this machine",
                'Run: apt install g++ ninja-build, or remove "offload_optimizer"',
            )
        )
    if (
        "optimizer" not in config
        and config.get("zero_force_ds_cpu_optimizer", True)
        and _text(flags.optim) not in KEPT_WHEN_OFFLOADED
    ):
        findings.append(
            Finding(
                "error",
                f"{name}: offload_optimizer with --optim {_text(flags.optim)}",
                "an offloaded optimizer is DeepSpeed's CPU Adam, with L2 regularisation for this --optim",
                'Use --optim adamw_torch, or remove "offload_optimizer"',
            )
        )
    return findings
