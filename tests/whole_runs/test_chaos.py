"""Kills at random moments, inside saving too, each followed by the same command: nothing is lost and nobody has to help."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import time

import fsdp_over_gloo
import jobs
import pytest
from saved_runs import ZERO_2, flags_for, losses, same_weights

from sft.saving import checkpoint, export

KILLS = {"ddp": 15, "zero2": 8, "fsdp": 8}
SEED = 20231
STEPS = 30
FLAGS = ["--max_steps", str(STEPS), "--save_steps", "2", "--gradient_accumulation_steps", "2"]
FLAGS += ["--resume_from_checkpoint", "True"]


WRITES = {  # function that writes to the disk -> a call of it up to which a rank may die
    "os.fsync": 120,
    "os.rename": 10,
    "os.replace": 4,
    "shutil.rmtree": 14,
    "json.dump": 8,
    "torch.save": 20,
    "checkpoint.digest": 40,
    "safetensors.save_file": 8,
    "export.complete": 1,
}


def die_at_a_call() -> None:
    """In a rank: end it, as SIGKILL ends it, at the nth call of a function that writes to the disk."""
    import torch
    from safetensors import torch as safetensors

    rank, where, calls = os.environ["DIE_AT"].split(":")
    if rank != os.environ["RANK"]:
        return
    home, name = where.split(".")
    places = {"os": os, "shutil": shutil, "json": json, "torch": torch, "safetensors": safetensors}
    module = (places | {"checkpoint": checkpoint, "export": export})[home]
    real, left = getattr(module, name), int(calls)

    def call(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.write(1, f"died in {where}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, call)


def prepare_rank() -> None:
    if "FSDP" in os.environ:
        fsdp_over_gloo.shard_on_a_cpu()
    if "DIE_AT" in os.environ:
        die_at_a_call()


def whole_step(output) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    return next((checkpoint.step_of(f) for f in checkpoint.newest_first(output) if not checkpoint.why_not_whole(f)), 0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", KILLS)
def test_kills_at_random_moments_lose_nothing(tiny_llama, questions_csv, tmp_path, engine):
    engine_flags, environment = [], {}
    if engine == "fsdp":  # each rank writes its shards
        engine_flags = ["--fsdp", "full_shard auto_wrap"]
        environment = {"FSDP": "on a CPU"}
    if engine == "zero2":
        pytest.importorskip("deepspeed")
        (tmp_path / "zero2.json").write_text(json.dumps(ZERO_2))
        engine_flags = ["--deepspeed", str(tmp_path / "zero2.json")]
    quiet = flags_for(tiny_llama, questions_csv, tmp_path / "quiet", *FLAGS, *engine_flags)
    jobs.run(quiet, 2, tmp_path / "quiet.log", prepare_rank, **environment)
    shards = [file for file in (tmp_path / "quiet").glob("checkpoint-*/*/*") if re.search("rank_1_|__1_", file.name)]
    assert bool(shards) == (engine != "ddp"), "another engine than this one ran"
    dice = random.Random(SEED)
    places = itertools.cycle(dice.sample(list(WRITES), len(WRITES)))  # each in turn
    kills, inside_saving, runs, log = 0, 0, 0, tmp_path / "log"
    while kills < KILLS[engine]:
        runs += 1
        output = tmp_path / f"run-{runs}"
        flags = flags_for(tiny_llama, questions_csv, output, *FLAGS, *engine_flags)
        reached, lives = 0, 0
        while not (output / export.COMPLETE).exists():
            lives += 1
            log.unlink(missing_ok=True)
            victim = dice.choice([0, 0, 0, 1])  # rank 0 writes most
            if dice.random() < 0.7:
                where = next(places)
                calls = dice.randint(1, WRITES[where])
                job = jobs.Job(flags, 2, log, prepare_rank, DIE_AT=f"{victim}:{where}:{calls}", **environment)
                codes = job.wait(timeout_s=60)
            else:
                job = jobs.Job(flags, 2, log, prepare_rank, **environment)
                while "trial save" not in job.printed() and job.runs():
                    time.sleep(0.02)
                time.sleep(dice.uniform(0, 1))
                job.kill(dice.choice([[victim], [0, 1]]))
                codes = job.wait(timeout_s=60)
            printed = job.printed()
            assert "Traceback" not in printed or -signal.SIGKILL in codes, printed
            killed = -signal.SIGKILL in codes and not (output / export.COMPLETE).exists()
            kills += killed
            inside_saving += killed and "died in" in printed
            now = whole_step(output)
            assert now >= reached, f"whole step {reached} was lost, {now} is left\n{printed}"
            reached = now
            assert killed or (output / export.COMPLETE).exists(), f"{codes}\n{printed}"
            assert lives < 40, printed
        assert losses(output) == losses(tmp_path / "quiet")
        assert same_weights(output, tmp_path / "quiet")
        assert not list(output.glob("incomplete*"))
        shutil.rmtree(output)
    print(f"{kills} kills survived, {inside_saving} of them inside saving, in {runs} runs of {STEPS} steps")
    assert inside_saving >= KILLS[engine] / 4
