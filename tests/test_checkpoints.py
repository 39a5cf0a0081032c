"""Checkpoints are whole or absent, a resumed run is the run that was never stopped, and an export is proved."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jobs
import pytest
import torch
from saved_runs import choose, flags_for, losses, same_weights, signal_at, train

import utils
from sft import checkpoints, fingerprint, rehearsal
from sft.arguments import UserError

# ---- exact resume


def test_a_run_stopped_in_an_epoch_and_at_its_end_continues_bit_for_bit(
    whole_run, tiny_llama, questions_csv, tmp_path, monkeypatch, capsys
):
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--resume_from_checkpoint", "True")
    for step in (5, 8, 11):  # inside the first epoch, at its end, inside the second
        with monkeypatch.context() as patch:
            signal_at(patch, step)
            trainer = train(*flags)
        assert trainer.state.global_step == step
        assert not (tmp_path / "out" / "model.safetensors").exists()
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    train(*flags)
    printed = capsys.readouterr().out
    assert "holds no checkpoint yet: starting from the beginning" in printed
    assert f"resume: {tmp_path / 'out' / 'checkpoint-5'}" in printed
    assert f"resume: {tmp_path / 'out' / 'checkpoint-8'}" in printed
    assert f"resume: {tmp_path / 'out' / 'checkpoint-11'}" in printed
    assert losses(tmp_path / "out") == losses(whole_run)
    assert len(losses(whole_run)) == 16
    assert same_weights(tmp_path / "out", whole_run)
    # the comparison sees a wrong continuation: a second epoch that is clipped at another norm
    other = flags_for(tiny_llama, questions_csv, tmp_path / "other", "--resume_from_checkpoint", "True")
    train(*other, "--max_grad_norm", "0.5", "--resume_with_changes", "True")
    assert not same_weights(tmp_path / "other", whole_run)
    shutil.rmtree(tmp_path / "out"), shutil.rmtree(tmp_path / "other")


def test_a_run_with_random_numbers_in_its_steps_continues_bit_for_bit(tiny_llama, questions_csv, tmp_path, monkeypatch):
    more = ["--use_lora", "True", "--lora_dropout", "0.3", "--max_steps", "6", "--resume_from_checkpoint", "True"]
    whole, stopped = (flags_for(tiny_llama, questions_csv, tmp_path / name, *more) for name in ("whole", "stopped"))
    train(*whole)
    with monkeypatch.context() as patch:
        signal_at(patch, 4)
        train(*stopped)
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    train(*stopped)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    # and the comparison sees it when the random state is not restored
    monkeypatch.setattr(utils.SupervisedTrainer, "_load_rng_state", lambda *_: None)
    train(*flags_for(tiny_llama, questions_csv, tmp_path / "other", *more))
    assert losses(tmp_path / "other")[:4] == losses(tmp_path / "whole")[:4]
    assert losses(tmp_path / "other") != losses(tmp_path / "whole")


def signal_rank_1_at_steps() -> None:
    """In a job's rank 1: send itself SIGUSR1 in the step named by SIGNAL_AT."""
    import utils

    real = utils.SupervisedTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        at = int(os.environ["SIGNAL_AT"])
        if os.environ["RANK"] == "1" and self.state.global_step + 1 == at and not self.stops.micro_batches:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, model, inputs, num_items_in_batch)

    utils.SupervisedTrainer.training_step = training_step


ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["packed", "padded", "zero2"])
def test_two_ranks_continue_bit_for_bit(tiny_llama, questions_csv, tmp_path, how):
    more = ["--packing", str(how != "padded"), "--gradient_accumulation_steps", "2", "--resume_from_checkpoint", "True"]
    if how == "zero2":
        (tmp_path / "ds.json").write_text(json.dumps(ZERO_2))
        more += ["--deepspeed", str(tmp_path / "ds.json")]
    whole, stopped = (flags_for(tiny_llama, questions_csv, tmp_path / name, *more) for name in ("whole", "stopped"))
    jobs.run(whole, 2, tmp_path / "whole.log")
    for step in {"packed": (8, 11), "padded": (3, 11), "zero2": (5,)}[how]:  # 8 steps in an epoch
        printed = jobs.run(stopped, 2, tmp_path / "log", signal_rank_1_at_steps, SIGNAL_AT=str(step))
        assert f"stopped at step {step} of 16" in printed
    jobs.run(stopped, 2, tmp_path / "log")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 16
    assert same_weights(tmp_path / "stopped", tmp_path / "whole")


# ---- whole or absent


@pytest.fixture
def two_checkpoints(whole_run, tmp_path):
    """A folder with checkpoint-15 and checkpoint-16 of the undisturbed run, to be damaged."""
    for name in ("checkpoint-15", "checkpoint-16"):
        shutil.copytree(whole_run / name, tmp_path / "out" / name)
    return tmp_path / "out"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def list_nothing(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("model.safetensors", cut_in_half, r"model\.safetensors has [\d,]+ of [\d,]+ bytes"),
        ("optimizer.pt", flip_a_byte, r"optimizer\.pt does not have the hash"),
        ("rng_state.pth", Path.unlink, r"rng_state\.pth is missing"),
        ("manifest.json", Path.unlink, r"no manifest\.json, so it was never finished"),
        ("manifest.json", lambda path: path.write_text(""), r"its manifest\.json is damaged"),
        ("manifest.json", lambda path: path.write_text("[]"), r"its manifest\.json is damaged"),
        ("manifest.json", list_nothing, r"does not list trainer_state\.json, rng_state\.pth"),
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


def test_a_missing_rank_file_of_a_larger_run_is_seen():
    files = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state_0.pth"]
    assert checkpoints.missing_parts(files, ranks=2) == ["rng_state_1.pth"]
    zero = ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "model.safetensors"]
    zero += [f"global_step4/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    assert checkpoints.missing_parts(zero, ranks=2) == []
    assert checkpoints.missing_parts(zero[:-1], ranks=2) == ["optimizer states of rank 1"]
    fsdp = ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt"]
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        fsdp += [f"{folder}/.metadata", f"{folder}/__0_0.distcp", f"{folder}/__1_0.distcp"]
    assert checkpoints.missing_parts(fsdp, ranks=2) == []
    fsdp.remove("optimizer_0/.metadata")
    assert checkpoints.missing_parts(fsdp, ranks=2) == ["optimizer_0/.metadata"]
    whole = [*fsdp[:4], "pytorch_model_fsdp.bin", "optimizer.bin"]
    assert checkpoints.missing_parts(whole, ranks=2) == []
    assert checkpoints.missing_parts(whole[:-1], ranks=2) == ["the optimizer's state"]


def test_only_damaged_checkpoints_stop_the_run(two_checkpoints):
    for name in ("checkpoint-15", "checkpoint-16"):
        cut_in_half(two_checkpoints / name / "optimizer.pt")
    with pytest.raises(UserError, match=r"checkpoint-16 is not whole: optimizer\.pt has .*Remove it to start"):
        choose(two_checkpoints)


def test_an_older_checkpoint_by_name_is_refused_beside_newer_ones(two_checkpoints):
    with pytest.raises(UserError, match="also holds checkpoint-16, which this run would mix with its own"):
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
        assert "names a file outside of it" in checkpoints.why_not_whole(two_checkpoints / "checkpoint-16")
        shutil.rmtree(two_checkpoints / "checkpoint-16")
        shutil.copytree(two_checkpoints / "checkpoint-15", two_checkpoints / "checkpoint-16")


def test_rotation_keeps_the_newest_and_the_best(two_checkpoints):
    for step in (9, 12):
        shutil.copytree(two_checkpoints / "checkpoint-15", two_checkpoints / f"checkpoint-{step}")
    checkpoints.rotate(
        two_checkpoints, two_checkpoints / "checkpoint-16", 2, best=str(two_checkpoints / "checkpoint-9")
    )
    assert sorted(f.name for f in two_checkpoints.iterdir()) == ["checkpoint-16", "checkpoint-9"]
    checkpoints.rotate(two_checkpoints, two_checkpoints / "checkpoint-16", 1, best=None)
    assert [f.name for f in two_checkpoints.iterdir()] == ["checkpoint-16"]


def test_the_old_checkpoint_goes_only_when_the_new_one_is_whole(tiny_llama, questions_csv, tmp_path, monkeypatch):
    seen = []
    real = checkpoints.rotate

    def rotate(output_dir, newest, limit, best):
        seen.append(
            (newest.name, checkpoints.why_not_whole(newest), [f.name for f in checkpoints.newest_first(output_dir)])
        )
        real(output_dir, newest, limit, best)

    monkeypatch.setattr(checkpoints, "rotate", rotate)
    trainer = train(
        *flags_for(tiny_llama, questions_csv, tmp_path / "out", "--save_total_limit", "1", "--max_steps", "6")
    )
    assert seen[1:] == [
        ("checkpoint-3", None, ["checkpoint-3"]),
        ("checkpoint-6", None, ["checkpoint-6", "checkpoint-3"]),
    ]
    assert [f.name for f in checkpoints.newest_first(tmp_path / "out")] == ["checkpoint-6"]
    assert seen[0][0] == "checkpoint-0"  # the rehearsal
    assert not list((tmp_path / "out").glob("incomplete*"))
    # what the rehearsal expected of the disk is what lies there; zip and pickle add some to a model of 39,072 weights
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "out" / "checkpoint-6").iterdir()}
    expected = rehearsal.checkpoint_bytes(trainer)
    assert expected == 3 * rehearsal.model_bytes(trainer, torch.float32) == 3 * 4 * 39_072
    assert expected < sizes["model.safetensors"] + sizes["optimizer.pt"] < 1.1 * expected


# ---- disks


def test_a_writer_that_fails_keeps_the_checkpoint_before_and_says_so(
    tiny_llama, questions_csv, tmp_path, monkeypatch, capfd
):
    real = utils.SupervisedTrainer._save_optimizer_and_scheduler

    def no_space_at_step_6(self, output_dir):
        if self.state.global_step == 6:
            raise OSError(28, "No space left on device")
        real(self, output_dir)

    monkeypatch.setattr(utils.SupervisedTrainer, "_save_optimizer_and_scheduler", no_space_at_step_6)
    with pytest.raises(SystemExit) as stop:
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))
    assert stop.value.code == 2
    assert re.search(
        r"checkpoint-6 could not be saved \(rank 0\): OSError: \[Errno 28\] No space.*\n.*checkpoint-3 is untouched: mend",
        capfd.readouterr().err,
    )
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
    assert "save rehearsal" not in printed
    for step in (6, 9, 12, 15, 16):
        assert f"warning: checkpoint-{step} was not saved: it needs" in printed
    assert "checkpoint-3 is untouched and training goes on" in printed
    assert [f.name for f in checkpoints.newest_first(tmp_path / "out")] == ["checkpoint-3"]
    assert same_weights(tmp_path / "out", whole_run)  # and a rehearsal changes nothing in the run that had one


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


def test_a_disk_that_fills_while_saving_loses_nothing(
    disk, whole_run, tiny_llama, questions_csv, tmp_path, monkeypatch, capfd
):
    output = disk("size=1700k")
    flags = flags_for(
        tiny_llama, questions_csv, output, "--save_rehearsal", "False", "--resume_from_checkpoint", "True"
    )
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "too_little_space", lambda *_: False)  # someone else takes the room meanwhile
        with pytest.raises(SystemExit) as stop:
            train(*flags)
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert re.search(r"checkpoint-9 could not be saved .*No space left on device", said, re.IGNORECASE)
    assert "checkpoint-6 is untouched: mend the cause and continue with --resume_from_checkpoint True" in said
    assert choose(output) == str(output / "checkpoint-6")
    disk("remount,size=20m")
    train(*flags)
    assert losses(output) == losses(whole_run)
    assert same_weights(output, whole_run)


def test_a_full_disk_is_seen_before_a_save_and_named_at_the_export(disk, tiny_llama, questions_csv, capfd):
    output = disk("size=1700k")
    flags = flags_for(tiny_llama, questions_csv, output, "--save_rehearsal", "False", "--report_to", "none")
    with pytest.raises(SystemExit) as stop:
        train(*flags, "--save_total_limit", "3")
    assert stop.value.code == 2
    said = capfd.readouterr()
    assert re.search(r"warning: checkpoint-9 was not saved: it needs .* and .* has .* free", said.out)
    assert re.search(r"error: model could not be saved .*No space left on device", said.err)
    assert "checkpoint-6 is untouched: mend the cause and continue with --resume_from_checkpoint True" in said.err
    assert choose(output) == str(output / "checkpoint-6")


def test_a_disk_that_turns_read_only_loses_nothing(disk, tiny_llama, questions_csv, monkeypatch, capfd):
    output = disk("size=20m")
    real = utils.SupervisedTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 4:
            disk("remount,ro")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(utils.SupervisedTrainer, "training_step", training_step)
    with pytest.raises(SystemExit) as stop:
        train(*flags_for(tiny_llama, questions_csv, output))
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert re.search(r"checkpoint-6 could not be saved .*Read-only file system", said)
    assert "checkpoint-3 is untouched" in said
    assert checkpoints.why_not_whole(output / "checkpoint-3") is None
    # and a run that begins there is refused before anything is loaded
    with pytest.raises(UserError, match=r"out is not a folder that can be written to\. Name another --output_dir"):
        train(*flags_for(tiny_llama, questions_csv, output / "new"))


# ---- the same run


def test_a_changed_run_is_listed_with_its_effects_and_refused(two_checkpoints, capsys):
    before = checkpoints.run_of(str(two_checkpoints / "checkpoint-16"))
    assert set(before) == set(fingerprint.EFFECT_OF_CHANGE)
    fingerprint.refuse_changes("checkpoint-16", before, before, go_on=False)
    now = before | {"seed": "4, data None", "world_size": "2"}
    with pytest.raises(UserError) as refused:
        fingerprint.refuse_changes("checkpoint-16", before, now, go_on=False)
    assert refused.value.problems[:2] == [
        "checkpoint-16 was made by a different run. world_size was '1' and is now '2': examples meet other ranks, random "
        "states are missing, and a sharded optimizer may not load at all",
        "checkpoint-16 was made by a different run. seed was '3, data None' and is now '4, data None': the remaining steps "
        "draw their examples from another permutation: rows can be seen twice or never",
    ]
    assert "--resume_with_changes True" in refused.value.problems[2]
    fingerprint.refuse_changes("checkpoint-16", before, now, go_on=True)
    assert capsys.readouterr().out.count("warning: resuming a changed run: ") == 2


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--seed 4", {"seed"}),
        ("--model_max_length 10", {"data", "model_max_length"}),
        ("--prompt_template alpaca --model_max_length 1024", {"data", "prompt_template", "model_max_length"}),
        ("--per_device_train_batch_size 4", {"examples_per_step", "micro_batch"}),
        ("--learning_rate 1e-3", {"learning_rate"}),
        ("--lr_scheduler_type cosine", {"schedule"}),
        ("--weight_decay 0.1", {"optimizer"}),
        ("--tokens_per_micro_batch 60", {"tokens_per_micro_batch"}),
        ("--packing False", {"packing", "tokens_per_micro_batch"}),
    ],
)
def test_what_each_flag_changes(whole_run, two_checkpoints, tiny_llama, questions_csv, flags, changed):
    command = flags_for(tiny_llama, questions_csv, two_checkpoints, "--resume_from_checkpoint", "True", *flags.split())
    with pytest.raises(UserError) as refused:
        train(*command)
    assert {problem.split("different run. ")[1].split()[0] for problem in refused.value.problems[:-1]} == changed


def test_another_runs_folder_is_refused_before_anything_is_loaded(whole_run, two_checkpoints):
    def problems(folder, **flags):
        flags = {"overwrite_output_dir": False, "resume_from_checkpoint": None, "check_data": False} | flags
        flags["output_dir"] = str(folder)
        return checkpoints.problems(SimpleNamespace(**flags))

    assert "holds a finished model" in problems(whole_run)[0]
    assert "it holds checkpoint-16 of an earlier run" in problems(two_checkpoints)[0]
    assert problems(two_checkpoints, resume_from_checkpoint="True") == []
    assert problems(two_checkpoints, overwrite_output_dir=True) == []
    assert choose(two_checkpoints, None) is None  # which starts again: the old checkpoints do not stay to be mixed in
    assert list(two_checkpoints.iterdir()) == []


# ---- rehearsal


def test_a_disk_too_small_for_the_run_stops_it_before_the_first_step(tiny_llama, questions_csv, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10**6))
    monkeypatch.setattr(utils.SupervisedTrainer, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(
        UserError, match=r"3 checkpoints x .* GB \+ model .* free in .*would fail when the disk is full"
    ):
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))


def test_a_folder_that_cannot_be_written_stops_the_run_before_the_first_step(
    tiny_llama, questions_csv, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(utils.SupervisedTrainer, "training_step", lambda *_: pytest.fail("a step was taken"))
    monkeypatch.setattr(Path, "mkdir", refuse_to_write_below(tmp_path / "out", Path.mkdir))
    with pytest.raises(SystemExit):
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))
    printed = capfd.readouterr().err
    assert "save rehearsal: a checkpoint could not be saved (rank 0): PermissionError" in printed
    assert "No step was taken. Mend the cause and start again." in printed


def refuse_to_write_below(folder: Path, real):
    def mkdir(self, *args, **kwargs):
        if self != folder and self.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(self))
        real(self, *args, **kwargs)

    return mkdir


def test_how_many_checkpoints_lie_on_the_disk_at_once():
    def kept(limit, strategy="steps", steps=100, every=10):
        args = SimpleNamespace(
            save_strategy=SimpleNamespace(value=strategy), save_total_limit=limit, num_train_epochs=3
        )
        return rehearsal.checkpoints_kept(
            SimpleNamespace(args=args, state=SimpleNamespace(max_steps=steps, save_steps=every))
        )

    assert kept(None) == 10
    assert kept(1) == 2  # the old one goes when the new one is whole
    assert kept(20) == 10
    assert kept(None, "epoch") == 3
    assert kept(None, "no") == 1


def test_a_run_that_is_resumed_at_its_end_takes_no_step_more(tiny_llama, questions_csv, tmp_path, monkeypatch):
    flags = flags_for(
        tiny_llama, questions_csv, tmp_path / "out", "--max_steps", "6", "--resume_from_checkpoint", "True"
    )
    with monkeypatch.context() as patch:  # killed between its last checkpoint and the export
        patch.setattr(utils, "export_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(*flags)
    assert choose(tmp_path / "out").endswith("checkpoint-6")
    before = (tmp_path / "out" / "checkpoint-6" / "model.safetensors").read_bytes()
    trainer = train(*flags)
    assert trainer.state.global_step == 6
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with pytest.raises(SystemExit) as ended:  # and once more: it is finished
        train(*flags)
    assert ended.value.code == 0
