"""A run that could not be saved ends before its first step."""

import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from saved_runs import flags_for, train

import utils
from sft.job import UserError
from sft.run import prepare
from sft.run.trainer import SupervisedTrainer
from sft.saving import rehearsal


def test_a_disk_too_small_for_the_run_stops_it_before_the_first_step(tiny_llama, questions_csv, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10**6))
    monkeypatch.setattr(utils, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(
        UserError, match=r"3 checkpoints x .* GB \+ model .* free in .*would fail when the disk is full"
    ):
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))


def test_what_old_checkpoints_free_counts_as_room(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(bytes(100))
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=130))
    assert "in its checkpoints" in rehearsal.check_space(tmp_path, checkpoint=100, kept=2, model=30)
    with pytest.raises(UserError, match="The run would fail when the disk is full"):
        rehearsal.check_space(tmp_path, checkpoint=100, kept=2, model=31)


def test_a_folder_that_cannot_be_written_stops_the_run_before_the_first_step(
    tiny_llama, questions_csv, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(SupervisedTrainer, "training_step", lambda *_: pytest.fail("a step was taken"))
    monkeypatch.setattr(Path, "mkdir", refuse_to_write_below(tmp_path / "out", Path.mkdir))
    with pytest.raises(SystemExit):
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))
    printed = capfd.readouterr().err
    assert "trial save: a checkpoint could not be saved (rank 0): PermissionError" in printed
    assert "No step was taken. Mend the cause and start again." in printed


def refuse_to_write_below(folder: Path, real):
    def mkdir(self, *args, **kwargs):
        if self != folder and self.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(self))
        real(self, *args, **kwargs)

    return mkdir


def test_how_many_checkpoints_lie_on_the_disk_at_once(tmp_path):
    def kept(limit, strategy="steps", steps=100, every=10):
        args = SimpleNamespace(
            save_strategy=SimpleNamespace(value=strategy), save_total_limit=limit, num_train_epochs=3
        )
        return rehearsal.checkpoints_kept(args, steps, every)

    assert kept(None) == 10
    assert kept(None, every=0.25) == 4  # a share of the steps
    assert kept(1) == 2  # the old one goes when the new one is whole
    assert kept(20) == 10
    assert kept(None, "epoch") == 3
    assert kept(None, "no") == 0
    assert kept(None, "best") == 1
    assert rehearsal.check_space(tmp_path, 10**18, 0, 1000).startswith("disk: model 1e-06 GB; ")


@pytest.mark.slow
def test_a_rehearsal_leaves_the_state_as_it_was(tiny_llama, questions_csv, tmp_path, monkeypatch):
    seen = []

    def rehearse(trainer, *how, real=prepare.rehearse):
        trainer.state.best_global_step, trainer.state.best_model_checkpoint = 7, "somewhere/checkpoint-7"
        trainer.state.log_history.append({"step": 0, "loss": 1.0})
        before = deepcopy(vars(trainer.state))
        what = real(trainer, *how)
        seen.append((before, deepcopy(vars(trainer.state)), what))
        trainer.state.best_global_step = trainer.state.best_model_checkpoint = None
        return what

    monkeypatch.setattr(prepare, "rehearse", rehearse)
    for small in (rehearsal.SMALL_BYTES, 0):
        monkeypatch.setattr(rehearsal, "SMALL_BYTES", small)
        train(*flags_for(tiny_llama, questions_csv, tmp_path / str(small), "--max_steps", "1"))
    assert [(before == after, what) for before, after, what in seen] == [(True, "complete"), (True, "a sample")]


@pytest.mark.parametrize(
    ("about", "each"),
    [
        ({}, 12),  # float32 weight and two moments
        ({"only_model": True}, 4),
        ({"deepspeed": True}, 12 + 2),  # and a copy in bfloat16
        ({"deepspeed": True, "models": True}, 12 + 2 * 2),  # and a model to upload
        ({"fsdp": "FULL_STATE_DICT"}, 16),
        ({"fsdp": "SHARDED_STATE_DICT"}, 12),
        ({"fsdp": "FULL_STATE_DICT", "only_model": True}, 4),
    ],
)
def test_what_a_checkpoint_takes_for_each_trained_weight(about, each):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 5, bias=False))
    model[1].requires_grad_(False)
    model.dtype = torch.bfloat16
    plugin = SimpleNamespace(state_dict_type=about.get("fsdp"))
    trainer = SimpleNamespace(
        model=model,
        is_deepspeed_enabled="deepspeed" in about,
        is_fsdp_enabled="fsdp" in about,
        checkpoints_are_models="models" in about,
        args=SimpleNamespace(save_only_model="only_model" in about),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
    )
    assert rehearsal.checkpoint_bytes(trainer) == each * 6


def test_what_an_export_takes_and_what_is_refused_before_weights_load(tmp_path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 5, bias=False))
    assert rehearsal.model_bytes(SimpleNamespace(model=model), torch.bfloat16) == 2 * 21
    model[1].requires_grad_(False)  # as under an adapter, which stays float32
    assert rehearsal.model_bytes(SimpleNamespace(model=model), torch.bfloat16) == 4 * 6

    real = shutil.disk_usage
    args = SimpleNamespace(output_dir=str(tmp_path), save_total_limit=1, save_steps=5, num_train_epochs=1)
    args.save_strategy = SimpleNamespace(value="steps")
    for only_model, each in ((False, 12), (True, 4)):
        args.save_only_model = only_model
        needed = 2 * each * 1000 + 2 * 1000  # a checkpoint is whole before the one before it goes
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=needed: real(path)._replace(free=free))
        rehearsal.refuse_full_disk(args, 1000, 10, torch.bfloat16)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=needed - 1: real(path)._replace(free=free))
        with pytest.raises(UserError, match="would fail when the disk is full"):
            rehearsal.refuse_full_disk(args, 1000, 10, torch.bfloat16)


@pytest.mark.slow
def test_an_adapters_dropout_is_the_same_without_a_rehearsal(tiny_llama, questions_csv, tmp_path):
    def weights(name: str, *flags: str) -> dict[str, torch.Tensor]:
        adapter = ("--use_lora", "True", "--lora_dropout", "0.5", "--max_steps", "2", "--save_strategy", "no")
        train(*flags_for(tiny_llama, questions_csv, tmp_path / name, *adapter, *flags))
        return load_file(tmp_path / name / "adapter_model.safetensors")

    pytest.importorskip("peft")
    rehearsed, not_rehearsed = weights("rehearsed"), weights("not", "--save_rehearsal", "False")
    assert all(torch.equal(weight, not_rehearsed[name]) for name, weight in rehearsed.items())
    other = weights("other", "--seed", "4")
    assert not all(torch.equal(weight, other[name]) for name, weight in rehearsed.items())
