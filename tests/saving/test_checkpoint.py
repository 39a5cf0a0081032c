"""Checkpoints are whole or absent, whatever happens to the process or the disk; a rehearsal says so before the first step."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saved_runs import choose, flags_for, losses, same_weights, train
from scripts import ROOT

from sft.job import UserError
from sft.run.trainer import SupervisedTrainer
from sft.saving import checkpoint, rehearsal, resume

# ---- whole or absent


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def list_nothing(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))


def deny_the_run(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": ["what", "ran"]}))


def say_in_the_state(**changes):
    """A trainer_state.json of the size that the manifest lists, with other content."""

    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        manifest = path.with_name("manifest.json")
        listed = json.loads(manifest.read_text())
        listed["files"][path.name]["bytes"] = path.stat().st_size
        manifest.write_text(json.dumps(listed))

    return change


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("scaler.pt", Path.touch, r"it holds a scaler\.pt that its manifest\.json does not list"),
        ("trainer_state.json", say_in_the_state(global_step=15), r"its trainer_state\.json is of step 15"),
        ("trainer_state.json", say_in_the_state(log_history={}), r"its trainer_state\.json is damaged \(not each of"),
        ("trainer_state.json", say_in_the_state(total_flos="1"), r"its trainer_state\.json is damaged \(not each of"),
        ("model.safetensors", cut_in_half, r"model\.safetensors has [\d,]+ of [\d,]+ bytes"),
        ("optimizer.pt", flip_a_byte, r"optimizer\.pt does not have the hash"),
        ("rng_state.pth", Path.unlink, r"rng_state\.pth is missing"),
        ("manifest.json", Path.unlink, r"no manifest\.json, so it was never finished"),
        ("manifest.json", lambda path: path.write_text(""), r"its manifest\.json is damaged"),
        ("manifest.json", lambda path: path.write_text("[]"), r"its manifest\.json is damaged"),
        ("manifest.json", list_nothing, r"its manifest\.json is damaged"),
        ("manifest.json", lambda path: path.write_text("[" * 100_000), r"its manifest\.json is damaged"),
        ("manifest.json", deny_the_run, r"its manifest\.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(two_checkpoints, capsys, file, damage, said):
    assert choose(two_checkpoints) == str(two_checkpoints / "checkpoint-16")
    damage(two_checkpoints / "checkpoint-16" / file)
    capsys.readouterr()
    assert choose(two_checkpoints) == str(two_checkpoints / "checkpoint-15")
    printed = capsys.readouterr().out
    assert re.search(rf"warning: checkpoint-16 is not whole: .*{said}.*Using checkpoint-15 instead", printed)
    with pytest.raises(UserError, match=said):  # asked for by name it is refused
        choose(two_checkpoints, str(two_checkpoints / "checkpoint-16"))


def test_every_piece_of_a_large_file_is_in_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 4)
    file = tmp_path / "weights"
    file.write_bytes(b"abcdefghij")
    of_pieces = b"".join(hashlib.sha256(piece).digest() for piece in (b"abcd", b"efgh", b"ij"))
    assert checkpoint.digest(file) == hashlib.sha256(of_pieces).hexdigest()


def test_a_missing_rank_file_of_a_larger_run_is_seen():
    files = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state_0.pth"]
    assert checkpoint.missing_parts(files, ranks=2) == ["rng_state_1.pth"]
    zero = ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth", "model.safetensors"]
    zero += [f"global_step4/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    assert checkpoint.missing_parts(zero, ranks=2) == []
    assert checkpoint.missing_parts(zero[:-1], ranks=2) == [r"global_step\d+/.*pp_rank_1_.*optim_states\.pt"]
    fsdp = ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt"]
    fsdp += ["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"]
    assert checkpoint.missing_parts(fsdp, ranks=2) == []
    assert checkpoint.missing_parts(fsdp[:-1], ranks=2) == ["optimizer"]
    assert checkpoint.missing_parts(fsdp[1:], ranks=2) == [r"trainer_state\.json"]


def test_a_checkpoint_under_another_steps_name_is_no_checkpoint(two_checkpoints, capsys):
    (two_checkpoints / "checkpoint-15").rename(two_checkpoints / "checkpoint-17")
    assert choose(two_checkpoints) == str(two_checkpoints / "checkpoint-16")
    assert "checkpoint-17 is not whole: its manifest.json is of step 15" in capsys.readouterr().out


def pretend_two_ranks(monkeypatch, rank: int) -> None:
    ranks = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: rank, get_world_size=lambda: 2)
    monkeypatch.setattr(checkpoint, "dist", ranks)


def test_what_either_rank_finds_damaged_is_damaged_for_both(two_checkpoints, monkeypatch):
    folder = two_checkpoints / "checkpoint-16"
    flip_a_byte(folder / "optimizer.pt")
    found = []
    for rank in (0, 1):  # each hashes half of the files
        pretend_two_ranks(monkeypatch, rank)
        found.append(checkpoint._problem_here(folder, "manifest.json"))
    assert sorted(problem is None for problem in found) == [False, True]
    monkeypatch.setattr(checkpoint, "gather", lambda mine: found)
    for rank in (0, 1):
        pretend_two_ranks(monkeypatch, rank)
        assert checkpoint.why_not_whole(folder).startswith("optimizer.pt does not have the hash")


def test_only_damaged_checkpoints_stop_the_run(two_checkpoints):
    for name in ("checkpoint-15", "checkpoint-16"):
        cut_in_half(two_checkpoints / name / "optimizer.pt")
    with pytest.raises(UserError, match=r"checkpoint-16 is not whole: optimizer\.pt has .*Remove it to start"):
        choose(two_checkpoints)


def test_an_older_checkpoint_by_name_is_refused_beside_newer_ones(two_checkpoints):
    newest = str(two_checkpoints / "checkpoint-16")
    assert choose(two_checkpoints, newest) == choose(two_checkpoints, f"{newest}/") == newest
    with pytest.raises(
        UserError, match=r"would mix its checkpoints with newer ones.*holds checkpoint-16, checkpoint-15"
    ):
        choose(two_checkpoints, str(two_checkpoints / "checkpoint-15"))
    with pytest.raises(UserError, match=r"no such checkpoint folder.*holds checkpoint-16, checkpoint-15"):
        choose(two_checkpoints, str(two_checkpoints / "checkpoint-14"))


def test_what_was_being_written_is_cleared_away(two_checkpoints):
    shutil.copytree(two_checkpoints / "checkpoint-16", two_checkpoints / "incomplete" / "checkpoint-20")
    assert choose(two_checkpoints) == str(two_checkpoints / "checkpoint-16")
    assert sorted(f.name for f in two_checkpoints.iterdir()) == ["checkpoint-15", "checkpoint-16"]


def test_a_manifest_cannot_name_files_outside_its_folder(two_checkpoints):
    for name in ("../checkpoint-15/optimizer.pt", "/etc/passwd"):
        manifest = json.loads((two_checkpoints / "checkpoint-16" / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        (two_checkpoints / "checkpoint-16" / "manifest.json").write_text(json.dumps(manifest))
        assert "names a file outside of it" in checkpoint.why_not_whole(two_checkpoints / "checkpoint-16")
        shutil.rmtree(two_checkpoints / "checkpoint-16")
        shutil.copytree(two_checkpoints / "checkpoint-15", two_checkpoints / "checkpoint-16")


def test_rotation_keeps_the_newest_and_the_best(two_checkpoints):
    for step in (9, 12):
        shutil.copytree(two_checkpoints / "checkpoint-15", two_checkpoints / f"checkpoint-{step}")
    checkpoint.rotate(two_checkpoints, two_checkpoints / "checkpoint-16", 2, best=str(two_checkpoints / "checkpoint-9"))
    assert sorted(f.name for f in two_checkpoints.iterdir()) == ["checkpoint-16", "checkpoint-9"]
    checkpoint.rotate(two_checkpoints, two_checkpoints / "checkpoint-16", 1, best=None)
    assert [f.name for f in two_checkpoints.iterdir()] == ["checkpoint-16"]


@pytest.mark.parametrize(
    ("limit", "best", "stay"),
    [(1, 3, [12, 3]), (2, 3, [12, 3]), (3, 3, [12, 9, 3]), (1, 12, [12]), (2, None, [12, 9]), (9, 6, [12, 9, 6, 3]),
     (None, 6, [12, 9, 6, 3]), (2, 77, [12, 9])],
)  # fmt: skip
def test_how_many_stay(tmp_path, limit, best, stay):
    for step in (3, 6, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.rotate(tmp_path, tmp_path / "checkpoint-12", limit, best and f"somewhere/checkpoint-{best}")
    assert [checkpoint.step_of(folder) for folder in checkpoint.newest_first(tmp_path)] == stay
    assert not (tmp_path / "incomplete").exists()


@pytest.mark.slow
def test_the_old_checkpoint_goes_only_when_the_new_one_is_whole(tiny_llama, questions_csv, tmp_path, monkeypatch):
    seen = []
    real = checkpoint.rotate

    def rotate(output_dir, newest, limit, best):
        seen.append(
            (newest.name, checkpoint.why_not_whole(newest), [f.name for f in checkpoint.newest_first(output_dir)])
        )
        real(output_dir, newest, limit, best)

    monkeypatch.setattr(checkpoint, "rotate", rotate)
    trainer = train(
        *flags_for(tiny_llama, questions_csv, tmp_path / "out", "--save_total_limit", "1", "--max_steps", "6")
    )
    assert seen[2:] == [
        ("checkpoint-3", None, ["checkpoint-3"]),
        ("checkpoint-6", None, ["checkpoint-6", "checkpoint-3"]),
    ]
    assert [f.name for f in checkpoint.newest_first(tmp_path / "out")] == ["checkpoint-6"]
    assert [name for name, *_ in seen[:2]] == [
        "checkpoint-0",
        "checkpoint-0",
    ]  # the rehearsal of a checkpoint and of the export
    assert not list((tmp_path / "out").glob("incomplete*"))
    # what the rehearsal expected of the disk is what lies there; zip and pickle add some to a model of 39,072 weights
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "out" / "checkpoint-6").iterdir()}
    expected = rehearsal.checkpoint_bytes(trainer)
    assert expected == 3 * rehearsal.model_bytes(trainer, torch.float32) == 3 * 4 * 39_072
    assert expected < sizes["model.safetensors"] + sizes["optimizer.pt"] < 1.1 * expected


def saver(output: Path, step: int = 3, best: int | None = None) -> SimpleNamespace:
    """What `save_whole` reads of a Trainer."""
    args = SimpleNamespace(output_dir=str(output), save_total_limit=None, push_to_hub=False, hub_token="hf_SECRET")
    args.should_save = args.save_only_model = True
    state = SimpleNamespace(global_step=step, best_global_step=best, best_model_checkpoint="left over")
    state.save_to_json = lambda path: Path(path).write_text(json.dumps({"best": state.best_model_checkpoint}))
    return SimpleNamespace(args=args, state=state)


def write_into(trainer) -> None:
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    (folder / "optimizer_0").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer_0/0.distcp", "training_args.bin"):
        (folder / name).write_text("of the stock Trainer")


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """SIGKILL loses nothing that the kernel holds, and so shows no missing fsync: their order is looked at."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def shown(path) -> str:
        return os.path.relpath(path, tmp_path)

    def noted(name, real):
        def call(old, new):
            events.append(f"{name} {shown(old)} -> {shown(new)}")
            real(old, new)

        return call

    def noted_fsync(handle) -> None:
        events.append(f"sync {shown(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    trainer = saver(tmp_path)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted("rename", rename))
    monkeypatch.setattr(os, "replace", noted("rename", replace))
    checkpoint.save_whole(trainer, {}, lambda: write_into(trainer))
    files = ["incomplete", "incomplete/checkpoint-3", "incomplete/checkpoint-3/model.safetensors"]
    files += ["incomplete/checkpoint-3/optimizer_0", "incomplete/checkpoint-3/optimizer_0/0.distcp"]
    assert sorted(events[:5]) == [f"sync {name}" for name in files]
    assert events[5:] == [
        "sync incomplete/checkpoint-3/.manifest.json.new",
        "rename incomplete/checkpoint-3/.manifest.json.new -> incomplete/checkpoint-3/manifest.json",
        "sync incomplete/checkpoint-3",
        "rename incomplete/checkpoint-3 -> checkpoint-3",
        "sync .",
    ]
    assert checkpoint.why_not_whole(tmp_path / "checkpoint-3") is None


def test_what_the_stock_saving_is_told_and_what_it_leaves(tmp_path):
    trainer, told = saver(tmp_path, step=3, best=3), {}

    def write() -> None:
        told.update(vars(trainer.args))
        write_into(trainer)

    checkpoint.save_whole(trainer, {"seed": "1"}, write)
    assert (told["output_dir"], told["hub_token"]) == (str(tmp_path / "incomplete"), None)
    assert (trainer.args.output_dir, trainer.args.hub_token) == (str(tmp_path), "hf_SECRET")
    folder = tmp_path / "checkpoint-3"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["model.safetensors", "optimizer_0/0.distcp", "trainer_state.json"]
    assert (manifest["step"], manifest["run"]) == (3, {"seed": "1"})
    # the best checkpoint is this one, under the name that it has now; one that is gone is none
    assert json.loads((folder / "trainer_state.json").read_text()) == {"best": str(folder)}
    for best, named in ((3, str(folder)), (2, None)):
        later = saver(tmp_path, step=4 + best, best=best)
        checkpoint.save_whole(later, {}, lambda later=later: write_into(later))
        assert later.state.best_model_checkpoint == named


# ---- disks


def test_a_writer_that_fails_keeps_the_checkpoint_before_and_says_so(
    tiny_llama, questions_csv, tmp_path, monkeypatch, capfd
):
    real = SupervisedTrainer._save_optimizer_and_scheduler

    def no_space_at_step_6(self, output_dir):
        if self.state.global_step == 6:
            raise OSError(28, "No space left on device")
        real(self, output_dir)

    monkeypatch.setattr(SupervisedTrainer, "_save_optimizer_and_scheduler", no_space_at_step_6)
    with pytest.raises(SystemExit) as stop:
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))
    assert stop.value.code == 2
    assert re.search(
        r"checkpoint-6 could not be saved \(rank 0\): OSError: \[Errno 28\] No space.*\n.*checkpoint-3 is untouched: mend",
        capfd.readouterr().err,
    )
    assert not (tmp_path / "out" / "incomplete").exists()  # its room may be what is missing
    assert choose(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-3")


def test_a_full_disk_skips_the_save_and_the_run_goes_on(
    whole_run, tiny_llama, questions_csv, tmp_path, monkeypatch, capsys
):
    real = shutil.disk_usage

    def full_at_step_6(path):
        usage = real(path)
        return usage._replace(free=1000) if (tmp_path / "out" / "checkpoint-3").exists() else usage

    monkeypatch.setattr(shutil, "disk_usage", full_at_step_6)
    train(*flags_for(tiny_llama, questions_csv, tmp_path / "out", "--save_rehearsal", "False"))
    printed = capsys.readouterr().out
    assert "trial save" not in printed
    for step in (6, 9, 12, 15, 16):
        assert f"warning: checkpoint-{step} was not saved: it needs" in printed
    assert "checkpoint-3 is untouched and training goes on" in printed
    assert [f.name for f in checkpoint.newest_first(tmp_path / "out")] == ["checkpoint-3"]
    assert same_weights(tmp_path / "out", whole_run)  # and a rehearsal changes nothing in the run that had one


def test_rank_0_decides_for_all_whether_there_is_room(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(bytes(100))
    real, mine = shutil.disk_usage, []
    for free, full in ((99, True), (100, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: real(path)._replace(free=free))
        for first in (True, False):
            monkeypatch.setattr(checkpoint, "gather", lambda own, first=first: mine.append(own) or [first, own])
            assert checkpoint.too_little_space(tmp_path, 6) is first
            assert mine.pop() is full


@pytest.fixture
def disk(tmp_path):
    """Mount a disk of so many kB at tmp_path/out; call it again with other options to change the disk."""
    folder = tmp_path / "out"
    folder.mkdir()

    def mount(options: str) -> Path:
        what = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(what, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def fill_at_step_5(monkeypatch, disk: Path, left_bytes: int) -> Path:
    """Someone else's file takes the disk's room between checkpoint-3 and checkpoint-6, all but so many bytes."""
    real, filler = SupervisedTrainer.training_step, disk / "of_someone_else"

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 4 and not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - left_bytes))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SupervisedTrainer, "training_step", training_step)
    return filler


@pytest.mark.slow
def test_a_disk_that_fills_while_saving_loses_nothing(
    disk, whole_run, tiny_llama, questions_csv, tmp_path, monkeypatch, capfd
):
    output = disk("size=20m")
    flags = flags_for(tiny_llama, questions_csv, output, "--resume_from_checkpoint", "True")
    with monkeypatch.context() as patch:
        filler = fill_at_step_5(patch, output, left_bytes=250_000)  # a checkpoint has 500,000
        patch.setattr(checkpoint, "too_little_space", lambda *_: False)  # taken after it was looked at
        with pytest.raises(SystemExit) as stop:
            train(*flags)
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert re.search(
        r"error: checkpoint-6 could not be saved \(rank 0\): .*\n.* GB free\. checkpoint-3 is untouched", said
    )
    assert choose(output) == str(output / "checkpoint-3")
    filler.unlink()
    train(*flags)
    assert losses(output) == losses(whole_run)
    assert same_weights(output, whole_run)


@pytest.mark.slow
def test_a_full_disk_is_seen_before_a_save_and_named_at_the_export(disk, tiny_llama, questions_csv, monkeypatch, capfd):
    output = disk("size=20m")
    fill_at_step_5(monkeypatch, output, left_bytes=100_000)  # the model has 156,000
    with pytest.raises(SystemExit) as stop:
        train(*flags_for(tiny_llama, questions_csv, output))
    assert stop.value.code == 2
    said = capfd.readouterr()
    assert re.search(r"warning: checkpoint-6 was not saved: it needs .* and .* has .* free", said.out)
    assert re.search(r"error: model could not be saved .*No space left on device", said.err)
    assert "checkpoint-3 is untouched: mend the cause and continue with --resume_from_checkpoint True" in said.err
    assert choose(output) == str(output / "checkpoint-3")


def test_a_disk_that_turns_read_only_loses_nothing(disk, tiny_llama, questions_csv, monkeypatch, capfd):
    output = disk("size=20m")
    real = SupervisedTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 4:
            disk("remount,ro")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SupervisedTrainer, "training_step", training_step)
    with pytest.raises(SystemExit) as stop:
        train(*flags_for(tiny_llama, questions_csv, output))
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert re.search(r"checkpoint-6 could not be saved .*Read-only file system", said)
    assert "checkpoint-3 is untouched" in said
    assert checkpoint.why_not_whole(output / "checkpoint-3") is None
    # and a run that begins there is refused before anything is loaded
    with pytest.raises(
        UserError, match=r"new: it cannot be made \(.*: Read-only file system\)\. Name another --output_dir"
    ):
        train(*flags_for(tiny_llama, questions_csv, output / "new"))


def test_an_output_folder_is_made_once_before_anything_is_loaded(tmp_path):
    def problems(folder) -> list[str]:
        flags = {"output_dir": str(folder), "check_data": False, "overwrite_output_dir": False}
        return resume.output_dir_problems(SimpleNamespace(**flags, resume_from_checkpoint=None))

    assert problems(tmp_path / "a" / "b") == problems(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    inside, long = tmp_path / "file" / "out", tmp_path / ("x" * 300)
    assert problems(inside) == [
        f"{inside}: it cannot be made ({inside.parent}: File exists). Name another --output_dir."
    ]
    assert problems(long) == [f"{long}: it cannot be made ({long}: File name too long). Name another --output_dir."]


# ---- rehearsal


HOLD = """
import sys, time
from sft.saving import checkpoint
lock = checkpoint.hold_output_dir(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused_until_the_first_has_ended(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another run writes there \(host .*, process {first.pid}, since 20"):
            checkpoint.hold_output_dir(str(tmp_path / "out"))
        first.kill()
    checkpoint.hold_output_dir(str(tmp_path / "out")).release()
