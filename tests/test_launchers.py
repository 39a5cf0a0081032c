"""What a launcher decides in the environment is taken as the flag, or refused."""

from types import SimpleNamespace

import pytest

from sft import launchers
from sft.job import UserError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", *launchers.STARTED):
        monkeypatch.delenv(name, raising=False)


def read(monkeypatch, *argv: str, **accelerate: str) -> tuple[SimpleNamespace, list[str], list[str]]:
    monkeypatch.setattr(launchers, "ACCELERATE", {f"ACCELERATE_{name}": value for name, value in accelerate.items()})
    flags = SimpleNamespace(bf16="--bf16" in argv, fp16="--fp16" in argv, use_cpu=False)
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
    asked = SimpleNamespace(bf16=False, fp16=False, use_cpu=True)
    assert launchers.read_environment(asked, []) == ([], [])


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
