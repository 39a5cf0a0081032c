"""What to change when a run does not fit in memory, cheapest first; and what an out-of-memory error says."""

import contextlib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from transformers import AutoConfig

from sft.job import rank, say
from sft.plan.memory import GIB, Plan, Setting, Shape, host_memory, make

# Changes that save memory, cheapest first: each alone, then together. What a run has already is left out of them.
LADDER = (
    "tokens",
    "checkpointing",
    "fsdp",
    "8bit",
    "checkpointing fsdp",
    "checkpointing 8bit",
    "checkpointing fsdp 8bit",
    "checkpointing offload",
    "checkpointing lora",
    "checkpointing lora 4bit",
)


def next_rungs(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The changes that this run could make, as flags to paste, with the plan that each would give."""
    s = plan.setting
    fewer = max(s.longest, plan.tokens // 2)
    many = s.ranks > 1
    optim = (
        "adamw_torch_8bit" if s.engine == "fsdp" or many else "adamw_bnb_8bit"
    )  # bitsandbytes knows no sharded weights
    alone = {"engine": "ddp", "stage": 0, "offload_optimizer": False, "offload_weights": False}
    offload = {"engine": "zero", "stage": 2, "offload_optimizer": True, "pinned": True, "optimizer": "adamw_torch"}
    offload |= {"float32_sums": True, "overlap": True}  # ds_config.json
    # name: already so, possible, flags, what it changes
    changes: dict[str, tuple[bool, bool, str, dict[str, Any]]] = {
        "tokens": (
            False,
            s.packing and fewer < plan.tokens,
            f"--tokens_per_micro_batch {fewer}",
            {"tokens_asked": fewer},
        ),
        "checkpointing": (s.checkpointing, True, "--gradient_checkpointing True", {"checkpointing": True}),
        "fsdp": (s.engine != "ddp", many, '--fsdp "full_shard auto_wrap"', {"engine": "fsdp", "handed_out": True}),
        "8bit": (
            "8bit" in s.optimizer,
            s.engine != "zero" and not s.lora_rank,
            f"--optim {optim}",
            {"optimizer": optim},
        ),
        "offload": (s.offload_optimizer, not s.lora_rank, '--deepspeed "ds_config.json"', offload),
        "lora": (s.lora_rank > 0, True, "--use_lora True", {**alone, "lora_rank": 16, "lora_dropout": True}),
        "4bit": (s.four_bit, True, "--load_in_4bit True", {**alone, "four_bit": True}),
    }
    for names in LADDER:
        wanted = [changes[name] for name in names.split() if not changes[name][0]]
        if not wanted or not all(possible for _, possible, _, _ in wanted):
            continue
        changed = replace(s, **{name: value for *_, fields in wanted for name, value in fields.items()})
        yield " ".join(flags for _, _, flags, _ in wanted), make(plan.shape, changed, plan.gpu_there, plan.host_there)


@contextlib.contextmanager
def explain_out_of_memory(plan: Plan | None) -> Iterator[None]:
    """End an out-of-memory in where it happened, the plan and the next rung, and exit code 3.

    The rank that ran out speaks for itself: the others may wait for it inside a collective, and torchrun ends them.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(describe_full(error, plan), file=sys.stderr, flush=True)
        raise SystemExit(3) from None


def describe_full(error: BaseException, plan: Plan | None) -> str:
    """Where the memory was full, the plan's table, and the next rung of the ladder."""
    of = "GPU" if isinstance(error, torch.OutOfMemoryError) else "host"
    asked = re.search(r"Tried to allocate [^.]+\.\d+ \wiB|Tried to allocate \S+ \S+", str(error))
    lines = [
        f"error: {of} memory is full (rank {rank()}), {where(error.__traceback__)}."
        + (f" {asked[0]}." if asked else "")
    ]
    if plan is not None:
        lines += plan.table()
        rungs = [(flags, changed) for flags, changed in next_rungs(plan) if changed.gpu_peak < 0.95 * plan.gpu_peak]
        fitting = [rung for rung in rungs if rung[1].fits]
        for flags, changed in (fitting or rungs)[:1]:
            lines.append(f"  Next rung: {flags} (planned: {changed.gpu_peak / GIB:.1f} GiB on the GPU)")
    return "\n".join(lines)


def where(traceback: TracebackType | None) -> str:
    """The part of the run that a traceback ends in, from the functions of the libraries that it passes through."""
    place = "while the run was prepared"
    while traceback is not None:
        code, variables = traceback.tb_frame.f_code, traceback.tb_frame.f_locals
        if code.co_name == "from_pretrained":
            place = "while the model was loaded"
        elif code.co_name in ("_move_model_to_device", "prepare_model", "_prepare_for_training"):
            place = "while the model was put on the GPU"
        elif code.co_name == "training_step":
            place = f"in a micro-batch of {variables['inputs']['input_ids'].numel():,} tokens"
        elif code.co_name == "evaluation_loop":
            place = "during an evaluation"
        elif code.co_name == "step" and ("optim" in code.co_filename or "deepspeed" in code.co_filename):
            place = "in the optimizer's step, where its state is made"
        elif code.co_name in ("_save_checkpoint", "save_model"):
            place = "while the model was saved"
        traceback = traceback.tb_next
    return place


def describe(plan: Plan) -> str:
    """The plan as a run prints it."""
    return "\n".join([*plan.table(), f"  {verdict(plan)}"])


def verdict(plan: Plan) -> str:
    """That it fits and what is left, or the cheapest change that makes it fit."""
    if plan.fits:
        room = (plan.gpu_usable - plan.gpu_peak) if plan.setting.cuda else (plan.host_there - plan.host_peak)
        return f"it fits, with {room / GIB:.1f} GiB left on the {'GPU' if plan.setting.cuda else 'host'}"
    for flags, changed in next_rungs(plan):
        if changed.fits:
            return (
                f"it does not fit. The cheapest change that does: {flags} ({changed.gpu_peak / GIB:.1f} GiB on the GPU)"
            )
    return "it does not fit, and no change known here makes it: it takes more GPUs, or a smaller model"


def plan(
    model_args: Any, args: Any, shape: Shape | None, step_tokens: int | None = None, compiled: bool = False
) -> Plan | None:
    """The plan of a run, said; None, and said too, for an architecture whose sizes have other names than LLaMA's.

    Args: see `Setting.of`.
    """
    if shape is None:
        say("memory plan: none, the sizes in this model's config have other names than LLaMA's")
        return None
    setting = Setting.of(model_args, args, step_tokens, compiled)
    gpu, host = (args.plan_gpu_gib or 0) * GIB, host_memory()
    if gpu:
        host = math.inf  # of another machine: not known
    elif setting.cuda:
        gpu = torch.cuda.get_device_properties(0).total_memory
    found = make(shape, setting, gpu, host)
    say(describe(found))
    return found


def stop_after_plan(flags: Any) -> list[str]:
    """Say the plan and end the run, or return what keeps it from being made."""
    try:
        config = AutoConfig.from_pretrained(
            flags.model_name_or_path, cache_dir=flags.cache_dir, trust_remote_code=flags.trust_remote_code
        )
    except (OSError, ValueError) as error:
        return [f"{flags.model_name_or_path}: its config cannot be loaded: {str(error).strip().splitlines()[0]}"]
    plan(flags, flags, Shape.of(config, flags.lora_target_modules))
    raise SystemExit(0)
