"""A resumed run is the run that was never stopped, or says in what it differs."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import jobs
import pytest
from saved_runs import ZERO_2, choose, flags_for, losses, same_weights, signal_at, train

import utils
from sft.job import UserError
from sft.saving import resume

# ---- exact resume


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_with_random_numbers_in_its_steps_continues_bit_for_bit(tiny_llama, questions_csv, tmp_path, monkeypatch):
    pytest.importorskip("peft")
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


# ---- the same run


def test_a_changed_run_is_listed_with_its_effects_and_refused(two_checkpoints, capsys):
    before = resume.saved_identity(str(two_checkpoints / "checkpoint-16"))
    assert set(before) == set(resume.EFFECT_OF_CHANGE)
    resume.refuse_changes("checkpoint-16", before, before, go_on=False)
    now = before | {"seed": "4, data None", "world_size": "2"}
    with pytest.raises(UserError) as refused:
        resume.refuse_changes("checkpoint-16", before, now, go_on=False)
    assert refused.value.problems[:2] == [
        "checkpoint-16 was made by a different run. world_size was '1' and is now '2': examples meet other ranks, random "
        "states are missing, and a sharded optimizer may not load at all",
        "checkpoint-16 was made by a different run. seed was '3, data None' and is now '4, data None': the remaining steps "
        "draw their examples from another permutation: rows can be seen twice or never",
    ]
    assert "--resume_with_changes True" in refused.value.problems[2]
    resume.refuse_changes("checkpoint-16", before, now, go_on=True)
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
        ("--packing False", {"packing", "tokens_per_micro_batch", "share_prefixes"}),
        ("--share_prefixes False", {"share_prefixes"}),
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
        return resume.output_dir_problems(SimpleNamespace(**flags))

    assert "holds a finished model" in problems(whole_run)[0]
    assert "it holds checkpoint-16 of an earlier run" in problems(two_checkpoints)[0]
    assert problems(two_checkpoints, resume_from_checkpoint="True") == []
    assert problems(two_checkpoints, overwrite_output_dir=True) == []
    assert choose(two_checkpoints, None) is None  # which starts again: the old checkpoints do not stay to be mixed in
    assert list(two_checkpoints.iterdir()) == []
