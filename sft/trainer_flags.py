"""List what becomes of each of the Trainer's own arguments (honoured, translated or refused), and which values cannot work."""

import dataclasses
import importlib.util
import inspect
import math
import os
import re
from typing import Any

import huggingface_hub
import torch
import transformers
from accelerate.utils import DynamoBackend
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig

from sft.flags_2023 import read_json
from sft.job import swapped

FIELDS = {f.name: f for f in dataclasses.fields(transformers.TrainingArguments)}

OTHER_DEFAULTS = {  # than the Trainer's
    "logging_nan_inf_filter": False,  # a broken run must show
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,  # every weight gets a gradient
    "do_train": True,  # what these scripts are for
    "prediction_loss_only": True,  # the logits of an evaluation would fill the memory
}
HONOURED = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm bf16
fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
use_liger_kernel liger_kernel_config torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
log_level log_level_replica report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy
eval_steps eval_delay per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps save_total_limit push_to_hub
label_smoothing_factor hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
greater_is_better restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu dataloader_drop_last
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics resume_from_checkpoint
""".split()
TRANSLATED = {
    "activation_checkpointing": "the same as --gradient_checkpointing",
    "activation_checkpointing_kwargs": "the same as --gradient_checkpointing_kwargs",
    "disable_tqdm": "there is no bar in a log: a line for each logged step",
    "local_rank": "launchers give it; LOCAL_RANK of the environment is used",
    "accelerator_config": "non_blocking is on with a GPU; keys that would share batches out otherwise are refused",
    "do_train": "False evaluates the model without training it: with --do_eval True and rows to evaluate",
    "do_eval": "True is what --eval_strategy does; it needs that flag, or --do_train False",
}
REFUSED = {  # any value but the default here: why, and what instead
    "bf16_full_eval": "an evaluation computes as training does. Use --bf16 True",
    "fp16_full_eval": "an evaluation computes as training does. Use --fp16 True",
    "use_cache": "a cache of keys and values fills the memory and nothing reads it. Remove the flag",
    "auto_find_batch_size": "the micro-batches are planned before the first step. Use --tokens_per_micro_batch auto, or --plan_only True",
    "logging_nan_inf_filter": "a run stops at a loss that is not finite and hides none. Remove the flag",
    "include_num_input_tokens_seen": "tokens are counted without it: on each logged line and in run_report.json. Remove the flag",
    **dict.fromkeys(
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
        "batch_eval_metrics".split(),
        "no logits are kept: an evaluation is one exact mean loss. Remove the flag",
    ),
    "save_on_each_node": "a checkpoint is written once, to a disk that the machines share. Remove the flag",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint in every run. Remove the flag",
    "ignore_data_skip": "a resumed run would train again on rows that it has seen, and skipping costs nothing. Remove the flag",
    "parallelism_config": "it has no form on a command line. Use --fsdp full_shard or --deepspeed FILE",
    "dataloader_in_order": "micro-batches would meet other optimizer steps. Remove the flag",
    "remove_unused_columns": "the rows have no unused columns. Remove the flag",
    "label_names": "the labels are named `labels`. Remove the flag",
    "length_column_name": "the lengths of the rows are known. Remove the flag",
    "do_predict": "ask the tuned model with: python -m sft.generate",
}
UNDER_PACKING = {  # refused in a packed run
    "neftune_noise_alpha": "its noise depends on the length of the row, which packing changes. Add --packing False",
    "average_tokens_across_devices": "the loss would depend on which rank has which example, which packing changes. Remove the flag, or "
    "add --packing False",
    "train_sampling_strategy": "it changes which examples share a step, to save padding. Packing computes no padding and keeps the "
    "steps: remove the flag, or add --packing False",
}
MOST_WORKERS = 256  # processes, of each rank: the DataLoader starts as many as it is told, until the machine is full
RANGES: dict[str, tuple[float, float]] = {  # at least, at most
    **dict.fromkeys(("model_max_length", "per_device_train_batch_size", "per_device_eval_batch_size"), (1, math.inf)),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "ddp_timeout", "ddp_bucket_cap_mb", "plan_world_size"), (1, math.inf)
    ),
    **dict.fromkeys(("torch_empty_cache_steps", "dataloader_prefetch_factor", "save_total_limit"), (1, math.inf)),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "num_train_epochs"), (0, 1e9)
    ),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "eval_delay"), (0, 1e9)),
    "dataloader_num_workers": (0, MOST_WORKERS),
    **dict.fromkeys(("plan_gpu_gib", "neftune_noise_alpha"), (0, math.inf)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), (0, 1 - 1e-9)),
}
OPTIMIZERS = {  # the module that --optim needs, and in which of its names; bitsandbytes has all the others in 8 bits
    "torchao": "torch_[48]bit", "galore_torch": "galore", "apollo_torch": "apollo", "lomo_optim": "lomo", "grokadamw": "grokadamw",
    "schedulefree": "schedule_free", "optimi": "stable_adamw", "torchdistx": "anyprecision", "torch_xla": "xla",
    "torch_npu": "npu", "bitsandbytes": "ademamix|lion|bnb|8bit|paged",
}  # fmt: skip
BATCHES = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")  # keys of --accelerator_config
BACKENDS = [backend.value.lower() for backend in DynamoBackend if backend.value != "NO"]
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # torch.compile's (2.13)
JSON_FLAGS = ("accelerator_config", "gradient_checkpointing_kwargs", "liger_kernel_config", "lr_scheduler_kwargs")


def trainer_problems(flags: Any) -> list[str]:
    """What cannot work in the values of the Trainer's arguments, known before anything is loaded.

    JSON in a flag's text is read into its place.
    """
    refused = REFUSED | (UNDER_PACKING if flags.packing else {})
    problems = [
        f"--{name} {getattr(flags, name)}: {why}."
        for name, why in refused.items()
        if name in FIELDS and getattr(flags, name) != default(name)
    ]
    for name, (low, high) in RANGES.items():
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:
            wanted = "from 0 to below 1" if high < 1 else f"at least {low}"
            ends = high in (2**32 - 1, MOST_WORKERS) or value > high > 1
            problems.append(f"--{name} {value}: it must be {wanted}{f' and at most {high:.0f}' if ends else ''}.")
    for name in JSON_FLAGS:
        try:
            if isinstance(getattr(flags, name), str):
                setattr(flags, name, read_json(f"--{name}", getattr(flags, name)))
        except ValueError as error:
            problems.append(str(error))
    batches = [key for key in BATCHES if key in (flags.accelerator_config or {})]
    wrong = {
        "--max_steps 0 trains nothing. Give a number of steps, or --num_train_epochs.": flags.max_steps == 0,
        f"--num_train_epochs {flags.num_train_epochs:g} trains nothing. Give more than 0.": flags.max_steps < 0
        and flags.num_train_epochs == 0,
        f"--accelerator_config: {', '.join(batches)} would change which rank has which rows. Remove the key.": batches,
        "--do_eval True: add --eval_strategy epoch (or steps), and rows to evaluate.": flags.do_eval
        and flags.do_train
        and text(flags.eval_strategy) == "no",
        "--fp16 True: a CPU computes float32 then. Remove the flag, or use --bf16 True.": flags.fp16
        and flags.use_cpu
        and not flags.bf16,
    }
    liger = flags.use_liger_kernel and not flags.plan_only
    backend, mode = flags.torch_compile_backend, flags.torch_compile_mode
    wrong |= {
        "--use_liger_kernel needs a GPU: its kernels are written in Triton. Remove the flag.": liger and flags.use_cpu,
        "--use_liger_kernel needs the package liger-kernel. Run: pip install liger-kernel": liger
        and importlib.util.find_spec("liger_kernel") is None,
        f"--optim_args {flags.optim_args}: write name=value, several with commas.": flags.optim_args
        and not all(part.count("=") == 1 for part in flags.optim_args.split(",")),
        f"--torch_compile_backend {backend}: choose one of {', '.join(BACKENDS)}.": backend not in (None, *BACKENDS),
        f"--torch_compile_mode {mode}: choose one of {', '.join(COMPILE_MODES)}.": mode not in (None, *COMPILE_MODES),
        "--save_steps 0 saves nothing. Use --save_strategy no.": text(flags.save_strategy) == "steps"
        and flags.save_steps == 0,
        "--dataloader_persistent_workers True needs workers: give --dataloader_num_workers too.": flags.dataloader_persistent_workers
        and not flags.dataloader_num_workers,
    }
    problems += [message for message, is_wrong in wrong.items() if is_wrong]
    return problems + _keys(flags) + _metric(flags) + _scheduler(flags) + _optimizer(flags) + _hub(flags)


def text(value: Any) -> str:
    return str(getattr(value, "value", value))


def default(name: str) -> Any:
    field = FIELDS[name]
    if name in OTHER_DEFAULTS:
        return OTHER_DEFAULTS[name]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def without_effect(flags: Any, given: set[str]) -> list[str]:
    """A notice for each given flag that another one leaves nothing to decide.

    --save_steps 10 --save_strategy epoch -> ["--save_steps changes nothing: --save_strategy epoch decides"]

    --per_device_eval_batch_size without evaluations is none: the commands of 2023 have it.
    """
    saves, evaluates, logs = map(text, (flags.save_strategy, flags.eval_strategy, flags.logging_strategy))
    schedule, tracked = text(flags.lr_scheduler_type), flags.report_to not in (None, "none", ["none"])
    warms_up = "num_warmup_steps" in inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[schedule]).parameters
    ddp = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not flags.fsdp and not flags.deepspeed
    why = {  # what decides, if it does -> which flags have nothing to decide then
        f"--save_strategy {saves} decides": ("save_steps " * (saves != "steps"))
        + "save_total_limit save_only_model" * (saves == "no"),
        f"--eval_strategy {evaluates} decides": ("eval_steps " * (evaluates != "steps"))
        + "eval_delay eval_samples" * (evaluates == "no"),
        f"--logging_strategy {logs} decides": "logging_steps" * (logs != "steps"),
        f"--max_steps {flags.max_steps} decides": "num_train_epochs" * (flags.max_steps > 0),
        f"--lr_scheduler_type {schedule} has no warm-up": "warmup_steps" * (not warms_up),
        f"--optim {text(flags.optim)} does not read it": " ".join(_unread_by_the_optimizer(flags, given)),
        "--packing False": "tokens_per_micro_batch share_prefixes compile_layers" * (not flags.packing),
        "it needs --push_to_hub True": "hub_token hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision"
        * (not flags.push_to_hub),
        "it needs --report_to": "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
        * (not tracked),
        "it needs --fsdp": "fsdp_config" * (not flags.fsdp),
        "this is not data-parallel training in several processes": "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph"
        * (not ddp),
        "it needs --resume_from_checkpoint": "resume_with_changes restore_callback_states_from_checkpoint"
        * (not flags.resume_from_checkpoint),
        "--resume_from_checkpoint continues the run there": "overwrite_output_dir"
        * (text(flags.resume_from_checkpoint or False).lower() != "false")
        * (not os.path.exists(os.path.join(flags.output_dir or "", "COMPLETE.json"))),  # of a finished model
        "it needs --messages": "train_on" * (not flags.messages),
        "--messages names the column": "source target" * bool(flags.messages),
    }
    return [
        f"--{name} changes nothing: {reason}"
        for reason, names in why.items()
        for name in names.split()
        if name in given
    ]


def _unread_by_the_optimizer(flags: Any, given: set[str]) -> list[str]:
    """Which of Adam's numbers that were given the chosen optimizer does not take."""

    def taken(**changed: float) -> Any:
        with swapped(flags, **changed):
            return transformers.Trainer.get_optimizer_cls_and_kwargs(flags, torch.nn.Linear(1, 1))[1]

    try:
        names = [name for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if name in given]
        return [name for name in names if taken() == taken(**{name: 0.123})]
    except (ImportError, ValueError):  # its package is missing, or its arguments: a problem of its own
        return []


def _keys(flags: Any) -> list[str]:
    """What nothing would read of the flags that hold JSON."""
    recompute = inspect.signature(torch.utils.checkpoint.checkpoint).parameters.keys() - {"function", "args", "kwargs"}
    takes = {
        "accelerator_config": set(inspect.signature(AcceleratorConfig).parameters),
        "gradient_checkpointing_kwargs": recompute | {"preserve_rng_state"},
    }
    switches = {"gradient_checkpointing_kwargs": "gradient_checkpointing", "liger_kernel_config": "use_liger_kernel"}
    unknown = {
        name: sorted(given.keys() - keys)
        for name, keys in takes.items()
        if isinstance(given := getattr(flags, name), dict)
    }
    return [
        f"--{name}: there is no {', '.join(keys)}. It takes {', '.join(sorted(takes[name]))}."
        for name, keys in unknown.items()
        if keys
    ] + [
        f"--{name} changes nothing without --{switch} True."
        for name, switch in switches.items()
        if getattr(flags, name) and not getattr(flags, switch)
    ]


def _metric(flags: Any) -> list[str]:
    """Evaluations give a loss and its perplexity; of both, the lower one is better."""
    if text(flags.save_strategy) == "best" and text(flags.eval_strategy) != "no":
        flags.metric_for_best_model = flags.metric_for_best_model or "loss"  # as with --load_best_model_at_end
    name = (flags.metric_for_best_model or "loss").removeprefix("eval_")
    if name not in ("loss", "perplexity"):
        return [f"--metric_for_best_model {flags.metric_for_best_model}: evaluations give loss and perplexity."]
    if flags.greater_is_better:
        return [f"--greater_is_better True: the lower {name} is the better one. Remove the flag."]
    if flags.metric_for_best_model:
        flags.greater_is_better = False  # the Trainer would take the highest perplexity
    return []


def _scheduler(flags: Any) -> list[str]:
    """Build the scheduler once, on one weight, and walk through it."""
    name, given = text(flags.lr_scheduler_type), flags.lr_scheduler_kwargs or {}
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[transformers.SchedulerType(name)]).parameters
    takes = {
        key for key in parameters if key not in ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    }
    if isinstance(given, str):
        return []  # not JSON, which has been said
    unknown = [key for key in given if key not in takes and "kwargs" not in takes]
    if unknown:
        return [
            f"--lr_scheduler_kwargs: {name} does not take {unknown[0]!r}. It takes {', '.join(sorted(takes)) or 'none'}."
        ]
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=max(flags.learning_rate, 1e-12))
        scheduler = transformers.get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=dict(given))
        metrics = [1.0] * ("metrics" in inspect.signature(scheduler.step).parameters)
        for _ in range(10):
            optimizer.step()
            scheduler.step(*metrics)
    except (TypeError, ValueError, ArithmeticError) as error:
        return [f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {given}: {error}."]
    return []


def _optimizer(flags: Any) -> list[str]:
    optim = text(flags.optim)
    module = next((module for module, names in OPTIMIZERS.items() if re.search(names, optim)), "torch")
    package = {"optimi": "torch-optimi"}.get(module, module.replace("_", "-"))
    if importlib.util.find_spec(module) is None:
        return [f"--optim {optim} needs the package {package}. Run: pip install {package}"]
    projects = re.search("galore|apollo", optim) is not None
    if projects and not flags.optim_target_modules:
        return [f"--optim {optim}: name the layers that it projects, such as --optim_target_modules all-linear."]
    if flags.optim_target_modules and not projects:
        return [f"--optim_target_modules changes nothing: {optim} has no layers of its own. Remove the flag."]
    return [] if projects else _optimizer_arguments(flags, optim)


def _optimizer_arguments(flags: Any, optim: str) -> list[str]:
    """Have the Trainer read --optim_args for one weight, with each of them left out once."""
    pairs = (flags.optim_args or "").replace(" ", "").split(",") if flags.optim_args else []
    if not all(pair.count("=") == 1 for pair in pairs):
        return []  # which has been said

    def read(pairs: list[str]) -> dict[str, Any]:
        with swapped(flags, optim_args=",".join(pairs)):
            return transformers.Trainer.get_optimizer_cls_and_kwargs(flags, torch.nn.Linear(1, 1))[1]

    try:
        unread = [pair for pair in pairs if read([other for other in pairs if other != pair]) == read(pairs)]
    except (TypeError, ValueError, AttributeError) as error:
        return [f"--optim_args {flags.optim_args}: {optim} cannot read it ({error})."]
    return [
        f"--optim_args {pair} changes nothing: {optim} does not read it, or that is its default." for pair in unread
    ]


def _hub(flags: Any) -> list[str]:
    """Ask the hub whom the token belongs to, before a model is trained that could not be uploaded."""
    if not flags.push_to_hub or flags.plan_only or int(os.environ.get("RANK", "0")) > 0:
        return []
    cure = "or remove the flag and upload the folder later: hf upload REPOSITORY FOLDER"
    token = flags.hub_token or huggingface_hub.get_token()
    if token is None:
        return [f"--push_to_hub needs a token. Run hf auth login, or set HF_TOKEN, {cure}"]
    try:
        huggingface_hub.whoami(token=token)
    except Exception as error:  # of whichever HTTP library the hub's client uses
        why = str(error).replace(token, "***").splitlines()[0]
        return [f"--push_to_hub: the hub does not answer this token ({type(error).__name__}: {why}). Mend that, {cure}"]
    return []


def trainer_table() -> str:
    """The Trainer's own arguments as a Markdown table: what becomes of each."""
    rows = ["| flag | default | here |", "|---|---|---|"]
    for name in FIELDS:
        packed = (
            f"honoured with --packing False; packed, refused: {UNDER_PACKING[name]}"
            if name in UNDER_PACKING
            else "honoured"
        )
        becomes = f"refused: {REFUSED[name]}" if name in REFUSED else packed
        becomes = f"translated: {TRANSLATED[name]}" if name in TRANSLATED else becomes
        value = default(name)
        shown = "" if value is None or value == [] else f"`{text(value)}`"
        rows.append(f"| `--{name}` | {shown} | {becomes}. |")
    return "\n".join(rows)
