"""The picture of a run."""

import copy
import math
from unittest.mock import MagicMock

import pytest
from watched import watch

from sft.report import picture, record


def figure_of(runs, path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    picture.draw(runs, path)
    return figures[0]


def test_the_picture_of_a_run(watched, tmp_path, monkeypatch):
    figure = figure_of({"packed": watched.record}, tmp_path / "loss.png", monkeypatch)
    assert figure.get_suptitle() == "packed: tiny_llama0, 48 examples, 6 per optimizer step"
    loss, rate, speed = figure.axes
    assert loss.get_ylabel() == "loss per trained token"
    assert (rate.get_xlabel(), rate.get_ylabel()) == ("optimizer step", "learning rate")
    assert speed.get_ylabel() == "tokens/s per process"
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines) == ["train", "evaluation"]
    assert list(lines["train"].get_xdata()) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(lines["train"].get_ydata()) == [entry["loss"] for entry in watched.record["log"]]
    assert list(lines["evaluation"].get_xdata()) == [0, 4, 8]
    shown = sorted(entry["eval_loss"] for entry in watched.record["evaluations"])
    assert sorted(text.get_text() for text in loss.texts) == sorted([f"{shown[0]:.3f}", f"{shown[-1]:.3f}"])
    assert list(rate.lines[0].get_ydata()) == [entry["learning_rate"] for entry in watched.record["log"]]
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]  # nothing half-written is left


def test_many_values_are_smoothed_and_gaps_stay_gaps(watched, tmp_path, monkeypatch):
    record = copy.deepcopy(watched.record) | {"status": "unfinished", "evaluations": []}
    record["log"] = [{**record["log"][0], "step": step, "loss": float(step % 2)} for step in range(1, 41)]
    record["log"][9]["loss"] = None  # a NaN as JSON holds it
    figure = figure_of({"run": record}, tmp_path / "loss.png", monkeypatch)
    raw, smooth = figure.axes[0].lines
    assert (raw.get_label(), smooth.get_label()) == ("train", "train, mean of 2 logged values")
    assert math.isnan(raw.get_ydata()[9]) and raw.get_ydata()[10] == 1.0
    assert list(smooth.get_ydata()[:3]) == [1.0, 0.5, 0.5]
    assert figure.get_suptitle().startswith("run (unfinished): ")


def test_a_running_mean():
    assert picture.running_mean([2, 4, 6], 2) == [2, 3, 5]
    assert picture.running_mean([2, math.nan, 6], 2) == [2, 2, 6]


@pytest.mark.slow
def test_a_picture_that_fails_stops_nothing_and_is_said_once(tiny_llama, questions_csv, tmp_path, monkeypatch):
    def draw(runs, path):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(record, "draw", draw)
    run = watch(tiny_llama, questions_csv, tmp_path / "model", "--max_steps 2")
    assert run.printed.count("loss.png was not written: RuntimeError: no fonts") == 1
    assert run.record["status"] == "finished" and not (run.folder / "loss.png").exists()
    assert "loss.png" not in (run.folder / "README.md").read_text()


def test_an_evaluation_that_was_not_finite_is_left_out():
    axes = MagicMock()
    losses = [None, 2.0, 1.5, 1.75]
    evaluations = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    picture.draw_evaluations(axes, evaluations, "red", 2, "evaluation")
    assert axes.plot.call_args.args == ((1, 2, 3), (2.0, 1.5, 1.75))
    assert sorted(call.args[:2] for call in axes.annotate.call_args_list) == [("1.500", (2, 1.5)), ("2.000", (1, 2.0))]
    axes.reset_mock()
    picture.draw_evaluations(axes, evaluations[:1], "red", 2, "evaluation")
    assert not axes.plot.called
