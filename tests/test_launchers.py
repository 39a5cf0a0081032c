"""What a launcher decides in the environment is taken as the flag, or refused; ranks meet at a store."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from sft import launchers
from sft.job import UserError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", *launchers.STARTED):
        monkeypatch.delenv(name, raising=False)


def read(monkeypatch, *argv: str, **accelerate: str) -> tuple[SimpleNamespace, list[str], list[str]]:
    set_by_it = {
        name if name.startswith("FSDP_") else f"ACCELERATE_{name}": value for name, value in accelerate.items()
    }
    monkeypatch.setattr(launchers, "ACCELERATE", set_by_it)
    flags = SimpleNamespace(
        bf16="--bf16" in argv, fp16="--fp16" in argv, use_cpu=False, deepspeed="--deepspeed" in argv
    )
    flags.fsdp, flags.gradient_accumulation_steps, flags.max_grad_norm = "--fsdp" in argv, 8, 1.0
    return flags, *launchers.read_environment(flags, list(argv))


def test_a_mixed_precision_is_the_flag(monkeypatch):
    flags, notices, problems = read(monkeypatch, MIXED_PRECISION="bf16")
    assert (flags.bf16, flags.fp16, problems) == (True, False, [])
    assert notices == ["ACCELERATE_MIXED_PRECISION=bf16 (accelerate launch) is taken as --bf16 True"]
    assert read(monkeypatch, "--bf16", MIXED_PRECISION="bf16")[1:] == ([], [])
    assert read(monkeypatch, "--bf16", MIXED_PRECISION="no")[1:] == ([], [])


@pytest.mark.parametrize(
    ("argv", "precision", "said"),
    [
        (["--fp16"], "bf16", "bf16 (accelerate launch) and --fp16 ask for different compute types"),
        (["--bf16=False"], "bf16", "bf16 (accelerate launch) and --bf16=False ask for different compute types"),
        ([], "fp8", "fp8 (accelerate launch) is no compute type here"),
    ],
)
def test_another_one_is_refused(monkeypatch, argv, precision, said):
    flags, notices, problems = read(monkeypatch, *argv, MIXED_PRECISION=precision)
    assert problems == [f"ACCELERATE_MIXED_PRECISION={said}. Choose --bf16 True or --fp16 True, and `no` there."]
    assert notices == [] and not flags.bf16


def test_what_accelerate_launch_always_sets_changes_nothing(monkeypatch):
    usual = {"MIXED_PRECISION": "no", "USE_CPU": "False", "DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default"}
    assert read(monkeypatch, **usual)[1:] == ([], [])


def test_engines_of_accelerate_launch_are_refused_with_the_flag_to_give(monkeypatch):
    asked = {"USE_DEEPSPEED": "true", "USE_FSDP": "true", "DYNAMO_BACKEND": "INDUCTOR", "USE_CPU": "True"}
    flags, notices, problems = read(monkeypatch, **asked)
    assert problems == [
        "ACCELERATE_USE_DEEPSPEED=true (accelerate launch): switch it off there; give the script --deepspeed FILE.",
        "ACCELERATE_USE_FSDP=true (accelerate launch): switch it off there; give the script --fsdp full_shard.",
        "ACCELERATE_DYNAMO_BACKEND=INDUCTOR (accelerate launch): switch it off there; layers are compiled by "
        "--compile_layers, a whole model by --torch_compile True.",
    ]
    assert flags.use_cpu and notices == ["ACCELERATE_USE_CPU (accelerate launch) is taken as --use_cpu True"]


def test_a_cpu_that_was_asked_for_twice_is_no_notice(monkeypatch):
    monkeypatch.setattr(launchers, "ACCELERATE", {"ACCELERATE_USE_CPU": "true"})
    asked = SimpleNamespace(bf16=False, fp16=False, use_cpu=True, fsdp=None, deepspeed=None)
    asked.gradient_accumulation_steps = asked.max_grad_norm = 1
    assert launchers.read_environment(asked, []) == ([], [])


def test_accumulation_and_clipping_are_the_flags_or_refused(monkeypatch):
    flags, notices, problems = read(monkeypatch, GRADIENT_ACCUMULATION_STEPS="4", GRADIENT_CLIPPING="0.5")
    assert (flags.gradient_accumulation_steps, flags.max_grad_norm, problems) == (4, 0.5, [])
    assert notices == [
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 (accelerate launch) is taken as --gradient_accumulation_steps 4",
        "ACCELERATE_GRADIENT_CLIPPING=0.5 (accelerate launch) is taken as --max_grad_norm 0.5",
    ]
    assert read(monkeypatch, GRADIENT_ACCUMULATION_STEPS="8", GRADIENT_CLIPPING="auto")[1:] == ([], [])
    for given, value in (("--gradient_accumulation_steps=8", "4"), ("", "many")):
        flags, notices, problems = read(monkeypatch, given, GRADIENT_ACCUMULATION_STEPS=value)
        assert (flags.gradient_accumulation_steps, notices) == (8, [])
        assert problems == [
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={value} (accelerate launch) and --gradient_accumulation_steps 8: unset the variable."
        ]


def test_what_accelerate_would_fill_in_from_the_environment_is_refused(monkeypatch):
    offloads = {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_VERSION": "1", "DEEPSPEED_ZERO_STAGE": "3"}
    assert read(monkeypatch, **offloads)[1:] == ([], [])
    (problem,) = read(monkeypatch, "--fsdp", **offloads)[2]
    assert problem.startswith(
        "FSDP_OFFLOAD_PARAMS=true, FSDP_VERSION=1 in the environment: unset it, and write what you want"
    )
    (problem,) = read(monkeypatch, "--deepspeed", **offloads)[2]
    assert problem.startswith("ACCELERATE_DEEPSPEED_ZERO_STAGE=3 in the environment: unset it")


def test_tasks_of_srun_that_know_no_rank_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    problems = read(monkeypatch)[2]
    assert len(problems) == 1 and problems[0].startswith("srun started 4 processes that do not know their rank")
    monkeypatch.setenv("RANK", "0")  # torchrun's, or the user's own
    assert read(monkeypatch)[2] == []
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert read(monkeypatch)[2] == []


@pytest.mark.parametrize(
    ("launcher", "variable"), [("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE")]
)
def test_two_tasks_are_already_too_many(monkeypatch, launcher, variable):
    monkeypatch.setenv(variable, "2")
    (problem,) = read(monkeypatch)[2]
    assert problem.startswith(f"{launcher} started 2 processes that do not know their rank")


@pytest.mark.parametrize(
    ("ranks", "here", "said", "sizes"),
    [
        (4, 2, "each of 2 machines holds the whole model, sharded among its 2 ranks", (2, 2)),
        (4, 4, "on one machine it is full_shard", None),
        (2, 1, "one rank on each machine shards with nobody: plain DDP, each process holds the whole model", None),
    ],
)
def test_hybrid_shard_shards_among_the_ranks_of_a_machine(monkeypatch, ranks, here, said, sizes):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    flags = SimpleNamespace(fsdp=True, fsdp_config={"hybrid_shard": True}, plan_only=False, parallelism_config=None)
    assert launchers.shard_inside_machines(flags) == [f"--fsdp hybrid_shard: {said}"]
    asked = flags.parallelism_config
    assert (asked and (asked.dp_replicate_size, asked.dp_shard_size)) == sizes
    assert bool(flags.fsdp) == (here > 1)


def test_hybrid_shard_takes_as_many_ranks_on_each_machine(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    flags = SimpleNamespace(fsdp=True, fsdp_config={"hybrid_shard": True}, plan_only=False)
    with pytest.raises(UserError, match="3 ranks, 2 of them on this machine"):
        launchers.shard_inside_machines(flags)


# ---- the store


@pytest.mark.slow
def test_a_rank_waits_for_rank_0_and_says_where(monkeypatch, capsys):
    monkeypatch.setattr(launchers, "SAYS_AFTER_S", 0.5)
    monkeypatch.setenv("RANK", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    waiting = threading.Thread(target=lambda: found.append(launchers._connect("127.0.0.1", lambda: port)))
    waiting.start()
    time.sleep(1)
    store = launchers._serve("127.0.0.1", port)
    waiting.join(timeout=10)
    store.set("a", "1")
    assert found[0].get("a") == b"1"
    assert f"rank 1 has waited 1 s for rank 0 at 127.0.0.1:{port}\n" in capsys.readouterr().out


def test_what_rank_0_needs_to_serve(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="Set MASTER_ADDR and MASTER_PORT too, or use torchrun"):
        launchers.open_store()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(UserError, match="rank 0 cannot serve there"):
            launchers._serve("127.0.0.1", taken.getsockname()[1])
