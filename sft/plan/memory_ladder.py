"""Name the cheapest change when a run does not fit in memory, and explain an out-of-memory error."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from sft.job import UserError, complain, rank, say
from sft.model.loading import load_config
from sft.plan import communication
from sft.plan.deepspeed_file import Unreadable
from sft.plan.memory import GIB, Plan, Setting, make
from sft.plan.model_sizes import NotMeasured, Shape

# Changes that save memory, cheapest first: each alone, then together. What a run has already is left out of them.
LADDER = (
    "tokens", "checkpointing", "fsdp", "8bit", "checkpointing fsdp", "checkpointing 8bit", "checkpointing fsdp 8bit",
    "checkpointing offload", "checkpointing lora", "checkpointing lora 4bit",
)  # fmt: skip
PHASES = {"data": "while the data was read", "load": "while the model was loaded", "train": "in training",
          "save": "while the model was saved"}  # fmt: skip
OFFLOAD = {  # what of ds_config.json takes or saves memory
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
    "data_types": {"grad_accum_dtype": "fp32"},
}


def cheaper_runs(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The changes that this run could make, as flags to paste, with the plan that each would give."""
    s = plan.setting
    fewer, many, sharded = max(s.model_max_length, plan.tokens // 2), s.ranks > 1, {"fsdp": "", "deepspeed": None}
    optim = "adamw_torch_8bit" if s.engine == "fsdp" or many else "adamw_bnb_8bit"  # it knows no sharded weights
    fsdp = {
        "fsdp": "full_shard",
        "fsdp_config": {"cpu_ram_efficient_loading": True, "state_dict_type": "SHARDED_STATE_DICT"},
    }
    offload = {"fsdp": "", "deepspeed": OFFLOAD, "optim": "adamw_torch"}
    # name: already so, possible, what to paste, the flags with their new values
    changes: dict[str, tuple[bool, bool, str, dict[str, Any]]] = {
        "tokens": (False, s.packing and fewer < plan.tokens, f"--tokens_per_micro_batch {fewer}",
                   {"tokens_per_micro_batch": fewer}),
        "checkpointing": (s.recomputes, True, "--gradient_checkpointing True", {"gradient_checkpointing": True}),
        "fsdp": (s.engine != "ddp", many, '--fsdp "full_shard auto_wrap"', fsdp),
        "8bit": ("8bit" in s.optimizer, s.engine != "zero" and not s.lora_rank, f"--optim {optim}", {"optim": optim}),
        "offload": (s.offload_optimizer, not s.lora_rank, '--deepspeed "ds_config.json"', offload),
        "lora": (s.lora_rank > 0, True, "--use_lora True", {**sharded, "use_lora": True}),
        "4bit": (s.load_in_4bit, True, "--load_in_4bit True", {**sharded, "load_in_4bit": True}),
    }  # fmt: skip
    for names in LADDER:
        wanted = [changes[name] for name in names.split() if not changes[name][0]]
        if not wanted or not all(possible for _, possible, _, _ in wanted):
            continue
        flags = s.flags | {name: value for *_, flags in wanted for name, value in flags.items()}
        changed = Setting(flags, s.step_tokens, s.compiled)
        yield " ".join(paste for _, _, paste, _ in wanted), make(plan.shape, changed)


@contextlib.contextmanager
def explain_out_of_memory(plan: Plan | None, phase: str) -> Iterator[None]:
    """End an out-of-memory error in where it happened (a key of PHASES), the plan and the cheapest change, and exit code 3.

    The rank that ran out prints it: the others may wait for it inside a collective, and torchrun ends them.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        complain(describe_full(error, plan, PHASES[phase]))
        raise SystemExit(3) from None


def describe_full(error: BaseException, plan: Plan | None, where: str) -> str:
    """Where the memory was full, the plan's table, and the cheapest change that takes less."""
    of = "GPU" if isinstance(error, torch.OutOfMemoryError) else "host"
    asked = re.search(r"(Tried|Unable) to allocate [\d.]+ \w+", str(error))
    lines = [f"error: {of} memory is full (rank {rank()}), {where}." + (f" {asked[0]}." if asked else "")]
    if plan is not None:
        lines += plan.table()
        runs = [run for run in cheaper_runs(plan) if run[1].gpu_peak < 0.95 * plan.gpu_peak]
        for flags, changed in sorted(runs, key=lambda run: not run[1].fits)[:1]:
            lines.append(f"  Try next: {flags} (planned: {changed.gpu_peak / GIB:.1f} GiB on the GPU)")
    return "\n".join(lines)


def describe(plan: Plan) -> str:
    """The plan as a run prints it."""
    return "\n".join([*plan.table(), *communication.lines(plan), f"  {verdict(plan)}"])


def verdict(plan: Plan) -> str:
    """That it fits and what is left, or the cheapest change that makes it fit."""
    if plan.fits:
        rooms = {"host": plan.setting.host_there - plan.host_peak, "GPU": plan.gpu_usable - plan.gpu_peak}
        where = "GPU" if plan.setting.cuda else "host"
        return f"it fits, with {rooms[where] / GIB:.1f} GiB left on the {where}"
    for flags, run in cheaper_runs(plan):
        if run.fits:
            return f"it does not fit. The cheapest change that does: {flags} ({run.gpu_peak / GIB:.1f} GiB on the GPU)"
    return "it does not fit, and none of the changes known here helps: use more GPUs or a smaller model"


def plan(
    model_args: Any, args: Any, config: PreTrainedConfig, step_tokens: int | None = None, compiled: bool = False
) -> Plan | None:
    """The memory plan of a run (see `Setting`); None, and a printed line, for an architecture that cannot be measured."""
    try:
        setting = Setting(vars(model_args) | vars(args), step_tokens, compiled)
        return make(Shape(config, model_args.lora_target_modules), setting)
    except NotMeasured as error:
        say(f"memory plan: none, {error}")
        return None


def stop_after_plan(flags: Any) -> list[str]:
    """Print the plan and end the run, with 1 where it would not fit, or return what keeps the plan from being made."""
    try:
        found = plan(flags, flags, load_config(flags))
    except UserError as error:
        return error.problems
    except Unreadable as error:
        return [str(error)]
    if found is not None:
        say(describe(found))
    raise SystemExit(found is not None and not found.fits)
