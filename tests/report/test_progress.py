"""The lines and the bar of a run, and what a tracker gets."""

import contextlib
import importlib.util
import io
import math
import re
import time
from types import SimpleNamespace

import pytest
import transformers
from records import state_with, unstarted
from watched import EVALUATED, flags_for, watch

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.job import UserError
from sft.report import progress
from sft.report.progress import ReportCallback


def test_the_printed_lines(watched):
    lines = watched.printed.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 8
    assert re.fullmatch(
        r"step 1/8  loss \d\.\d{4}  lr 1\.00e-02  grad \d+\.\d\d  [\d,]+ tok/s/process \([\d,]+ trained\)  "
        r"padding \d+\.\d%  mem \d+\.\d\d GiB  left \d+:\d\d",
        steps[0],
    ), steps[0]
    evaluations = [line for line in lines if line.startswith("evaluation at step")]
    assert [line.split(":")[0] for line in evaluations] == [f"evaluation at step {step}" for step in (0, 4, 8)]
    assert "(lowest so far)" in evaluations[1]
    found = [entry["eval_loss"] for entry in watched.record["evaluations"]]
    lowest = (0, 4, 8)[found.index(min(found))]
    assert f"lowest evaluation loss: {min(found):.4f} at step {lowest}; the weights are those of step 8" in lines
    # an answer stands behind its question, without the template
    answers = [line for line in lines if re.match(r"  \S.* -> .*   \(data: ", line)]
    assert len(answers) == 6 and not any("Question:" in line or "Answer:" in line.split(" -> ")[0] for line in answers)
    assert not any("{'loss'" in line for line in lines)  # the Trainer's own printer is gone


def test_a_line_by_hand():
    logs = {"loss": 1.23456, "learning_rate": 1.98e-5, "grad_norm": 0.912, "tokens_per_s_per_gpu": 65883.4}
    logs |= {"trained_tokens_per_s_per_gpu": 31204.0, "padding_share": 0.0, "mfu": 0.4134, "peak_memory_gib": 40.127}
    assert progress.live_line(logs, 40, 300, 3725.0, "cuda") == (
        "step  40/300  loss 1.2346  lr 1.98e-05  grad 0.91  65,883 tok/s/GPU (31,204 trained)  padding 0.0%  MFU 41.3%  "
        "mem 40.13 GiB  left 1:02:05"
    )


def test_what_is_left_is_reckoned_from_the_steps_of_this_process(tmp_path):
    callback, state = ReportCallback(unstarted(tmp_path)[0]), state_with(0)
    state.global_step, state.max_steps = 100, 200  # resumed
    assert callback._seconds_left(1000.0, state, {"step_time_s": 3.0}) == 300
    state.global_step = 105
    assert callback._seconds_left(1010.0, state, {"step_time_s": 3.0}) == 95 * 2


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            [math.nan, 1.5, 1.25, math.inf],
            ["lowest evaluation loss: 1.2500 at step 3; the weights are those of step 9"],
        ),
        ([1.25, 1.5], ["lowest evaluation loss: 1.2500 at step 1; the weights are those of step 9"]),
        ([math.nan, 1.5], []),  # one number is no comparison
        ([1.5], []),
    ],
)
def test_the_lowest_evaluation_is_a_number(tmp_path, losses, said):
    callback, state = ReportCallback(unstarted(tmp_path)[0]), transformers.TrainerState(global_step=9, max_steps=10)
    callback.report.record["evaluations"] = [
        {"step": step, "eval_loss": loss, "eval_perplexity": 2.0} for step, loss in enumerate(losses, 1)
    ]
    printed = []
    callback._print = printed.append
    callback.on_train_end(SimpleNamespace(load_best_model_at_end=False), state, None)
    assert printed == said
    assert callback.report.record["final"]["eval_loss"] is losses[-1] and not callback.report.complete
    state.global_step = 10
    callback.on_train_end(SimpleNamespace(load_best_model_at_end=False), state, None)
    assert callback.report.complete  # at the last step, not beyond it


def test_the_lowest_so_far_is_told_from_the_second_evaluation_on():
    logs = {"eval_loss": 1.5, "eval_perplexity": 4.5, "eval_tokens": 1e4, "eval_runtime": 3.06}
    for earlier, best in (([], ""), ([1.6], " (lowest so far)"), ([1.5], " (lowest so far)"), ([1.4], "")):
        log = [{"eval_loss": loss} for loss in [*earlier, 1.5]]
        assert progress.evaluation_line(logs, transformers.TrainerState(global_step=40, log_history=log)) == (
            f"evaluation at step 40: loss 1.5000{best}, perplexity 4.5 over 10,000 trained tokens, 3.1 s"
        )


@pytest.fixture(scope="module")
def on_a_terminal(tiny_llama, questions_csv, tmp_path_factory):
    """Four steps whose stderr is a terminal, with a tracker where one is installed."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    tracker = "--report_to tensorboard" if importlib.util.find_spec("tensorboard") else "--report_to none"
    folder = tmp_path_factory.mktemp("terminal") / "model"
    with contextlib.redirect_stderr(terminal):
        run = watch(
            tiny_llama, questions_csv, folder, EVALUATED, "--eval_samples 0 --max_steps 4 --disable_tqdm False", tracker
        )
    return run, terminal.getvalue()


def test_a_terminal_has_a_bar_under_the_lines(on_a_terminal):
    run, shown = on_a_terminal
    assert "4/4" in shown and "evaluating" in shown
    assert [line.split("  ")[0] for line in run.printed.splitlines() if line.startswith("step ")] == [
        "step 1/4", "step 2/4", "step 3/4", "step 4/4"
    ]  # fmt: skip


def test_a_line_costs_under_half_a_percent_of_a_step_of_100_ms(tmp_path, monkeypatch):
    """After 20,000 logged steps as after one: processor time of this thread, writing left to the next test."""
    report_, args = unstarted(tmp_path)
    monkeypatch.setattr(report_, "write", lambda spare=False: None)
    callback, state = ReportCallback(report_), state_with(20_000)
    with contextlib.redirect_stdout(io.StringIO()):
        callback.on_train_begin(args, state, None)
        began = time.thread_time()
        for _ in range(100):
            state.global_step += 1
            state.log_history.append(state.log_history[-1] | {"step": state.global_step})
            callback.on_log(args, state, None, logs=state.log_history[-1])
        seconds = (time.thread_time() - began) / 100
    assert len(report_.record["log"]) == 20_100
    assert seconds < 0.005 * 0.1, seconds


def test_a_tracker_gets_the_names_of_the_record(on_a_terminal):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = on_a_terminal
    (events,) = run.folder.rglob("events.out.tfevents.*")
    tracked = EventAccumulator(str(events))
    tracked.Reload()
    for name in set(run.record["log"][0]) - {"step", "epoch"}:
        values = [(scalar.step, scalar.value) for scalar in tracked.Scalars(f"train/{name}")]
        assert values == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in run.record["log"]], name
    for name in ("loss", "perplexity"):
        values = [(scalar.step, scalar.value) for scalar in tracked.Scalars(f"eval/{name}")]
        evaluations = run.record["evaluations"]
        assert values == [(e["step"], pytest.approx(e[f"eval_{name}"], rel=1e-6)) for e in evaluations]


def test_a_tracker_that_is_not_there(monkeypatch):
    monkeypatch.setattr(transformers.integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert progress.tracker_problems(SimpleNamespace(report_to=["tensorboard", "wandb", "tensorbord"])) == [
        f"--report_to {name}: no such tracker, or its package is not installed. Usable here: tensorboard, all, none."
        for name in ("wandb", "tensorbord")
    ]
    for fine in ("none", ["all"], [], None):
        assert progress.tracker_problems(SimpleNamespace(report_to=fine)) == []


def test_a_tracker_is_refused_before_the_rows_are_read(tiny_llama, questions_csv, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.integrations, "get_available_reporting_integrations", list)
    monkeypatch.setattr(utils, "make_supervised_data_module", lambda *_: pytest.fail("the rows were read"))
    with pytest.raises(UserError, match="--report_to mlflow: no such tracker, or its package is not installed"):
        utils.train(
            load_llama_tokenizer, flags_for(tiny_llama, questions_csv, tmp_path / "model", "--report_to mlflow")
        )
