"""A resumed run is the run that was never stopped, or says in what it differs."""

import json
import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import jobs
import pytest
from safetensors.torch import load_file, save_file
from saved_runs import ZERO_2, choose, flags_for, losses, same_weights, signal_at, train
from transformers import TrainerState

from sft.job import UserError
from sft.run import prepare
from sft.run.trainer import Intervals, SupervisedTrainer
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
    monkeypatch.setattr(SupervisedTrainer, "_load_rng_state", lambda *_: None)
    train(*flags_for(tiny_llama, questions_csv, tmp_path / "other", *more))
    assert losses(tmp_path / "other")[:4] == losses(tmp_path / "whole")[:4]
    assert losses(tmp_path / "other") != losses(tmp_path / "whole")


def signal_rank_1_at_steps() -> None:
    """In a job's rank 1: send itself SIGUSR1 in the step named by SIGNAL_AT."""
    real = SupervisedTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        at = int(os.environ["SIGNAL_AT"])
        if os.environ["RANK"] == "1" and self.state.global_step + 1 == at and not self.message.micro_batches:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, model, inputs, num_items_in_batch)

    SupervisedTrainer.training_step = training_step


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


@pytest.mark.slow
def test_plain_data_parallel_goes_on_alone(whole_run, tiny_llama, questions_csv, tmp_path):
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--resume_from_checkpoint", "True")
    halved = [*flags, "--gradient_accumulation_steps", "2"]
    jobs.run(halved, 2, tmp_path / "log", signal_rank_1_at_steps, SIGNAL_AT="5")
    train(*flags)
    for step, reference in zip(losses(tmp_path / "out"), losses(whole_run), strict=True):
        assert step == pytest.approx(reference, rel=2e-5)


def test_a_checkpoint_without_an_optimizer_is_not_continued(two_checkpoints):
    """As --save_only_model True leaves it: the learning rate would begin anew."""
    newest = two_checkpoints / "checkpoint-16"
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (newest / name).unlink()
        del manifest["files"][name]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as refused:
        choose(two_checkpoints)
    assert refused.value.problems == [
        f"{newest} cannot be continued: it was saved with --save_only_model True, without an optimizer. To train on from its weights, "
        f"start a new run with --model_name_or_path {newest} and another --output_dir."
    ]


def test_a_resumed_run_saves_and_logs_as_its_own_command_says(capsys):
    state = TrainerState(logging_steps=1, save_steps=500, eval_steps=500, max_steps=100)
    args = SimpleNamespace(logging_steps=1, save_steps=0.2, eval_steps=None)
    Intervals().on_train_begin(args, state, None)
    assert (state.logging_steps, state.save_steps, state.eval_steps) == (1, 20, 500)
    assert capsys.readouterr().out == "resume: --save_steps 20 from here on; it was 500\n"


@pytest.mark.slow
def test_a_run_that_is_resumed_at_its_end_takes_no_step_more(tiny_llama, questions_csv, tmp_path, monkeypatch):
    flags = flags_for(
        tiny_llama, questions_csv, tmp_path / "out", "--max_steps", "2", "--resume_from_checkpoint", "True"
    )
    killed_in_the_export(monkeypatch, flags)
    assert choose(tmp_path / "out").endswith("checkpoint-2")
    before = (tmp_path / "out" / "checkpoint-2" / "model.safetensors").read_bytes()
    trainer = train(*flags)
    assert trainer.state.global_step == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    record = json.loads((tmp_path / "out" / "run_report.json").read_text())
    assert record["final"]["train_loss"] == pytest.approx(
        sum(entry["loss"] for entry in record["log"]) / 2
    )  # of the whole run
    with pytest.raises(SystemExit) as ended:  # and once more: it is finished
        train(*flags)
    assert ended.value.code == 0


# ---- the same run


def test_a_changed_run_is_listed_with_its_effects_and_refused(two_checkpoints, capsys):
    before = resume.saved_identity(str(two_checkpoints / "checkpoint-16"))
    assert set(before) == {
        *resume.EFFECT_OF_CHANGE,
        "engine",
        "--attn_implementation",
    }  # chosen; other flags have their defaults
    resume.refuse_changes("checkpoint-16", before, before, go_on=False)
    now = before | {"seed": "4, data None", "precision": "bf16", "prompt_template": "0"}
    with pytest.raises(UserError) as refused:
        resume.refuse_changes("checkpoint-16", before, now, go_on=False)
    assert str(refused.value).splitlines()[:-1] == [
        "checkpoint-16 was made by a different run.",
        "  - prompt_template is another one: the model is taught two different prompts",
        "  - seed was '3, data None' and is now '4, data None': the remaining steps draw their examples from another permutation: "
        "rows can be seen twice or never",
        "  - precision was 'float32' and is now 'bf16': steps are computed in another number format",
    ]
    assert len(refused.value.problems) == 1 and str(refused.value).endswith("with --resume_with_changes True.")
    resume.refuse_changes("checkpoint-16", before, now, go_on=True)
    assert capsys.readouterr().out.count("warning: resuming a changed run: ") == 3


@pytest.mark.parametrize("go_on", [False, True])
def test_another_engine_does_not_read_the_checkpoint(two_checkpoints, go_on):
    before = resume.saved_identity(str(two_checkpoints / "checkpoint-16")) | {"engine": "FSDP"}
    with pytest.raises(UserError) as refused:
        resume.refuse_changes("checkpoint-16", before, before | {"engine": "DDP", "world_size": "1"}, go_on)
    assert refused.value.problems == [
        "checkpoint-16 was saved by FSDP, and this run is DDP, which cannot read it. Start this run as that one was started (FSDP with "
        "one rank: torchrun --nproc_per_node=1)."
    ]


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--seed 4", {"seed"}),
        ("--model_max_length 10", {"data", "model_max_length"}),
        (
            "--prompt_template alpaca --model_max_length 1024",
            {"data", "prompt_template", "model_max_length", "tokens_per_micro_batch"},
        ),
        slow("--per_device_train_batch_size 4", {"examples_per_step", "micro_batch"}),
        slow("--learning_rate 1e-3", {"learning_rate"}),
        slow("--lr_scheduler_type cosine", {"schedule"}),
        slow("--weight_decay 0.1", {"optimizer"}),
        slow("--tokens_per_micro_batch 60", {"tokens_per_micro_batch"}),
        ("--packing False", {"packing", "tokens_per_micro_batch", "share_prefixes", "--attn_implementation"}),
        slow("--share_prefixes False", {"share_prefixes"}),
        slow('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":2}', {"schedule", "--lr_scheduler_kwargs"}),
        slow("--full_determinism True", {"--full_determinism"}),
        slow("--ddp_static_graph True", {"--ddp_static_graph"}),
        slow("--attn_implementation sdpa", {"--attn_implementation"}),
        (
            "--early_stopping_patience 2 --eval_strategy steps --eval_steps 3 --eval_split 0.1",
            {"data", "evaluation", "--early_stopping_patience"},
        ),
    ],
)
def test_what_each_flag_changes(whole_run, two_checkpoints, tiny_llama, questions_csv, flags, changed):
    command = flags_for(tiny_llama, questions_csv, two_checkpoints, "--resume_from_checkpoint", "True", *flags.split())
    with pytest.raises(UserError) as refused:
        train(*command)
    assert {line.split()[1] for line in str(refused.value).splitlines()[1:-1]} == changed


def test_flags_that_change_nothing_are_no_difference(two_checkpoints, tiny_llama, questions_csv):
    free = "--logging_steps 5 --save_total_limit 1 --save_strategy epoch --run_name again --eval_samples 2 --save_dtype bfloat16"
    free += " --dataloader_num_workers 1 --log_level error --ddp_timeout 60 --hub_private_repo True"
    args = flags_for(tiny_llama, questions_csv, two_checkpoints, "--resume_from_checkpoint", "True", *free.split())
    assert train(*args).state.global_step == 16


def test_a_checkpoint_of_an_earlier_version_is_compared_by_what_it_recorded(two_checkpoints, capsys):
    now = resume.saved_identity(str(two_checkpoints / "checkpoint-16"))
    before = {key: value for key, value in now.items() if key not in ("base_weights", "evaluation")}
    resume.refuse_changes("checkpoint-16", before, now | {"--neftune_noise_alpha": "5.0"}, go_on=False)
    assert capsys.readouterr().out == (
        "warning: checkpoint-16 is of another version of these scripts. "
        "Not compared: base_weights, evaluation and flags not named in it.\n"
    )
    with pytest.raises(UserError, match="seed was '2, data None' and is now '3, data None'"):
        resume.refuse_changes("checkpoint-16", before | {"seed": "2, data None"}, now, go_on=False)


def test_a_flag_that_is_back_at_its_default_is_a_difference(two_checkpoints):
    now = resume.saved_identity(str(two_checkpoints / "checkpoint-16"))
    said = "--neftune_noise_alpha was '5.0' and is now 'its default': the remaining steps are computed otherwise"
    with pytest.raises(UserError, match=said):
        resume.refuse_changes("checkpoint-16", now | {"--neftune_noise_alpha": "5.0"}, now, go_on=False)


@pytest.mark.slow
def test_an_adapter_does_not_continue_on_other_weights(tiny_llama, questions_csv, tmp_path):
    pytest.importorskip("peft")
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    more = ["--use_lora", "True", "--max_steps", "2", "--save_steps", "1", "--resume_from_checkpoint", "True"]
    train(*flags_for(base, questions_csv, tmp_path / "out", *more))
    (tmp_path / "out" / "COMPLETE.json").unlink()
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as refused:
        train(*flags_for(base, questions_csv, tmp_path / "out", *more))
    assert [line.split()[1] for line in str(refused.value).splitlines()[1:-1]] == ["base_weights"]


def killed_in_the_export(monkeypatch, flags) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Run, "_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(*flags)


BEST = "--load_best_model_at_end True --eval_strategy steps --eval_steps 1 --save_steps 1 --max_steps 3 --eval_split 0.1 --eval_samples 0"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
def test_a_resumed_run_still_knows_its_best_checkpoint(tiny_llama, questions_csv, tmp_path, monkeypatch, limit):
    # at a learning rate of 0 the first evaluation stays the best; a falling loss makes the last one the best
    rate, best = ("1e-2", 3) if limit == 1 else ("0", 1)
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", *BEST.split(), "--learning_rate", rate)
    flags += ["--save_total_limit", str(limit), "--resume_from_checkpoint", "True"]
    killed_in_the_export(monkeypatch, flags)
    killed_in_the_export(monkeypatch, flags)
    trainer = train(*flags)
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")


def test_another_runs_folder_is_refused_before_anything_is_loaded(whole_run, two_checkpoints):
    def problems(folder, **flags):
        flags = {
            "overwrite_output_dir": False,
            "resume_from_checkpoint": None,
            "check_data": False,
            "do_train": True,
        } | flags
        flags["output_dir"] = str(folder)
        return resume.output_dir_problems(SimpleNamespace(**flags))

    assert "holds a finished model" in problems(whole_run)[0]
    assert "it holds checkpoint-16 of an earlier run" in problems(two_checkpoints)[0]
    assert problems(two_checkpoints, resume_from_checkpoint="True") == []
    assert problems(two_checkpoints, overwrite_output_dir=True) == []
    assert choose(two_checkpoints, None) is None  # which starts again: the old checkpoints do not stay to be mixed in
    assert list(two_checkpoints.iterdir()) == []
