"""Read what a launcher says in the environment: this process's rank, where the ranks meet, and settings, taken as flags or refused."""

import os
import socket
import time
from collections.abc import Callable

import torch
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed import PrefixStore, Store, TCPStore

from sft.outside import UserError


def rank() -> int:
    """This process's rank in the job, as its launcher sets it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its machine, as its launcher sets it; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes in the job, as the launcher sets it; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


# `accelerate launch` sets these, and Accelerate obeys them. Read at import, because the Trainer sets some of them too.
ACCELERATE = {name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}

REFUSED = {  # variable -> the flag that does it here
    "USE_DEEPSPEED": "give the script --deepspeed FILE",
    "USE_FSDP": "give the script --fsdp full_shard",
    "USE_MEGATRON_LM": "there is no Megatron-LM here",
    "USE_PARALLELISM_CONFIG": "give the script --fsdp full_shard or --deepspeed FILE",
    "TORCH_DEVICE": "choose GPUs by CUDA_VISIBLE_DEVICES, or give the script --use_cpu True",
    "DYNAMO_BACKEND": "layers are compiled by --compile_layers, a whole model by --torch_compile True",
}

NUMBERS = {  # variable -> the flag that it is taken as
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
}
STARTED = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}  # processes


def read_environment(flags, argv: list[str]) -> tuple[list[str], list[str]]:
    """Change the flags as the environment says; the notices of it, and the problems.

    ACCELERATE_MIXED_PRECISION=bf16 -> flags.bf16 = True, and a notice
    """
    notices, problems = [], []
    for name, instead in REFUSED.items():
        value = ACCELERATE.get(f"ACCELERATE_{name}", "no")
        if value.lower() not in ("no", "false", "0", ""):
            problems.append(f"ACCELERATE_{name}={value} (accelerate launch): switch it off there; {instead}.")
    precision = ACCELERATE.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    asked = [name for name in ("bf16", "fp16") if getattr(flags, name)]
    if precision not in ("no", *asked):
        source = f"ACCELERATE_MIXED_PRECISION={precision} (accelerate launch)"
        given = [word for word in argv if word.split("=")[0] in ("--bf16", "--fp16")]
        if precision in ("bf16", "fp16") and not given:
            setattr(flags, precision, True)
            notices.append(f"{source} is taken as --{precision} True")
        else:
            against = f" and {given[0]} ask for different compute types" if given else " is no compute type here"
            problems.append(f"{source}{against}. Choose --bf16 True or --fp16 True, and `no` there.")
    for name, flag in NUMBERS.items():
        value, kind = ACCELERATE.get(name, "auto"), type(getattr(flags, flag))
        try:
            if value.lower() in ("auto", "none", "") or kind(value) == getattr(flags, flag):
                continue
            if f"--{flag}" in (word.split("=")[0] for word in argv):
                raise ValueError
            setattr(flags, flag, kind(value))
            notices.append(f"{name}={value} (accelerate launch) is taken as --{flag} {value}")
        except ValueError:
            problems.append(
                f"{name}={value} (accelerate launch) and --{flag} {getattr(flags, flag)}: unset the variable."
            )
    for prefix, flag, where in (("FSDP_", "fsdp", "--fsdp_config"), ("ACCELERATE_DEEPSPEED_", "deepspeed", "its file")):
        found = [f"{name}={value}" for name, value in ACCELERATE.items() if name.startswith(prefix)]
        if found and getattr(flags, flag):  # Accelerate would fill in with them what the flag leaves open
            problems.append(
                f"{', '.join(found)} in the environment: unset it, and write what you want of it in {where}."
            )
    if ACCELERATE.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes") and not flags.use_cpu:
        flags.use_cpu = True
        notices.append("ACCELERATE_USE_CPU (accelerate launch) is taken as --use_cpu True")
    for name, launcher in STARTED.items():
        if "RANK" not in os.environ and int(os.environ.get(name) or 1) > 1:
            problems.append(
                f"{launcher} started {os.environ[name]} processes that do not know their rank: each would train alone into "
                "the same folder. Let it start torchrun, once on each machine (examples/slurm.sh), or set RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process."
            )
            break
    return notices, problems


def drop_fsdp_where_nothing_is_sharded(flags) -> list[str]:
    """accelerate 1.15 does not shard on the CPU and falls back to DDP without a word; here it is printed."""
    if not flags.fsdp or not (flags.use_cpu or "WORLD_SIZE" not in os.environ):
        return []
    flags.fsdp, flags.fsdp_config = None, None
    where = "on the CPU" if flags.use_cpu else "in a process without torchrun"
    kind = "this run is plain DDP, each process holds" if world_size() > 1 else "this process holds"
    return [f"--fsdp: Accelerate does not shard {where}: {kind} the whole model"]


def shard_inside_machines(flags) -> list[str]:
    """`--fsdp hybrid_shard`: sharded among the ranks of a machine, copied between machines, which meet once in a step."""
    if not (flags.fsdp and flags.fsdp_config.get("hybrid_shard")) or flags.plan_only:
        return []
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    machines, rest = divmod(world_size(), here)
    if rest:
        raise UserError(
            f"--fsdp hybrid_shard: {world_size()} ranks, {here} of them on this machine. Start as many on each."
        )
    if machines == 1:
        return ["--fsdp hybrid_shard: on one machine it is full_shard"]
    if here == 1:
        flags.fsdp, flags.fsdp_config = None, None
        return [
            "--fsdp hybrid_shard: one rank on each machine shards with nobody: plain DDP, each process holds the whole model"
        ]
    flags.parallelism_config = ParallelismConfig(dp_replicate_size=machines, dp_shard_size=here)
    return [f"--fsdp hybrid_shard: each of {machines} machines holds the whole model, sharded among its {here} ranks"]


SAYS_AFTER_S = 5.0  # of waiting for other ranks; later, six times that, because ranks have different work


def open_store() -> Store:
    """Connect to torchrun's store, or to rank 0's, which serves one at MASTER_PORT for the process group too.

    The store of torchrun's agent outlives a restart of the workers (--max_restarts). There, rank 0 of each attempt serves a
    new one, so that its ranks do not meet the keys of dead ones, and MASTER_PORT becomes that one's.
    """
    here = torch.accelerator.device_count() or world_size()
    os.environ.setdefault("LOCAL_RANK", str(rank() % here))  # not set by hand, and Accelerate needs it
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError("RANK and WORLD_SIZE are set. Set MASTER_ADDR and MASTER_PORT too, or use torchrun.") from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return PrefixStore("sft", _serve(address, port) if rank() == 0 else _connect(address, lambda: port))
    agent = TCPStore(address, port, is_master=False)
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return PrefixStore("sft", agent)
    if rank() == 0:
        store = _serve(address, 0)
        agent.set("sft/port", str(store.port))
    else:
        store = _connect(address, lambda: int(agent.get("sft/port")))  # an earlier attempt's, until rank 0 has set it
    os.environ["MASTER_PORT"] = str(store.port)
    return PrefixStore("sft", store)


def _serve(address: str, port: int) -> TCPStore:
    try:
        return TCPStore(address, port, is_master=True, wait_for_workers=False, multi_tenant=port != 0)
    except torch.distributed.DistError as error:
        raise UserError(f"MASTER_PORT {port}: rank 0 cannot serve there ({error}). Choose another port.") from error


def _connect(address: str, port: Callable[[], int]) -> TCPStore:
    """Connect to rank 0's store when it is there. A plain socket tries first: TCPStore prints C++ warnings (torch 2.13)."""
    began, patience_s = time.monotonic(), SAYS_AFTER_S
    while True:
        try:
            with socket.create_connection((address, port()), timeout=2):
                return TCPStore(address, port(), is_master=False, wait_for_workers=False)
        except (OSError, torch.distributed.DistError) as error:
            waited = time.monotonic() - began
            if waited > 1800:  # as long as PyTorch waits for a process group
                raise UserError(f"rank 0 does not answer at {address}:{port()}: {error}") from error
        if waited > patience_s and (local_rank() == 0 or rank() == 1):
            print_wait(f"rank 0 at {address}:{port()}", began)
            patience_s *= 2
        time.sleep(0.2)


def print_wait(whom: str, began: float) -> None:
    print(f"rank {rank()} has waited {time.monotonic() - began:.0f} s for {whom}", flush=True)
