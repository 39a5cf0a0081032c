"""Read what a launcher decides through the environment: take it as if it were the flag, or refuse it."""

import os

from accelerate.parallelism_config import ParallelismConfig

from sft.job import UserError, world_size

# `accelerate launch` sets these, and Accelerate obeys them. Read at import, because the Trainer sets some of them too.
ACCELERATE = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}

REFUSED = {  # variable -> the flag that does it here
    "USE_DEEPSPEED": "give the script --deepspeed FILE",
    "USE_FSDP": "give the script --fsdp full_shard",
    "USE_MEGATRON_LM": "there is no Megatron-LM here",
    "USE_PARALLELISM_CONFIG": "give the script --fsdp full_shard or --deepspeed FILE",
    "DYNAMO_BACKEND": "layers are compiled by --compile_layers, a whole model by --torch_compile True",
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
