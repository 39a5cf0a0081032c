"""Draw runs: loss, evaluation loss, learning rate and tokens per second over the optimizer steps."""

import math
import os
from pathlib import Path

import numpy as np

from sft.job import UserError
from sft.outside import counted

COLOURS = ("#1f5fa8", "#d1572b", "#2c8a57", "#8b4fa8", "#9a7a1c", "#4a4a4a")
SMOOTHED_FROM = 40  # logged values; fewer are drawn as they are


def draw(runs: dict[str, dict], path: Path) -> None:
    """Draw runs, name -> record (run_report.json), on one figure and write it to a PNG file, which is replaced in one go."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    loss, rate, speed = figure.subplot_mosaic("LL;RS", height_ratios=(2, 1)).values()
    for index, ((name, record), colour) in enumerate(zip(runs.items(), COLOURS * len(runs))):
        label = f"{name}: " if len(runs) > 1 else ""
        width = 2 + 2.5 * (len(runs) - 1 - index)  # so that curves on top of each other can all be seen
        log, evaluation_colour = record["log"], colour if label else COLOURS[1]
        steps = [entry["step"] for entry in log]
        draw_noisy(loss, steps, [number(entry["loss"]) for entry in log], colour, width, f"{label}train")
        draw_evaluations(loss, record["evaluations"], evaluation_colour, width, f"{label}evaluation")
        rate.plot(steps, [entry["learning_rate"] for entry in log], color=colour, linewidth=width)
        draw_noisy(speed, steps, [entry["tokens_per_s_per_gpu"] for entry in log], colour, 2)

    figure.suptitle("\n".join(describe(name, record) for name, record in runs.items()), fontsize=11)
    loss.set(ylabel="loss per trained token")
    rate.set(xlabel="optimizer step", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    kinds = {record["hardware"]["device"] for record in runs.values()}
    speed.set(xlabel="optimizer step", ylabel=f"tokens/s per {'process' if kinds == {'cpu'} else 'GPU'}")
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in (loss, rate, speed):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", integer=True)
        axes.margins(x=0.04)
        axes.set_ylim(bottom=None if axes is loss else 0)
    loss.legend(frameon=False)
    unfinished = path.with_name(f".{path.name}.tmp")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)


def describe(name: str, record: dict) -> str:
    """model: open_llama_7b, 1,200 examples, 64 per optimizer step"""
    text = name if record["status"] == "finished" else f"{name} ({record['status']})"
    if "batch" not in record:
        return text
    model, rows = Path(record["model"]["name"]).name, record["data"]["train"]["kept"]
    return f"{text}: {model}, {counted(rows, 'example')}, {record['batch']['examples_per_step']:,} per optimizer step"


def draw_noisy(axes, steps: list[int], values: list[float], colour: str, width: float, label: str = "") -> None:
    """Draw values; if there are many, draw them faintly, with their running mean over a twentieth of them."""
    if len(values) >= SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8, label=label)
        window = len(values) // 20
        values, label = running_mean(values, window), label and f"{label}, mean of {window} logged values"
    axes.plot(steps, values, color=colour, linewidth=width, label=label)


def draw_evaluations(axes, evaluations: list[dict], colour: str, width: float, label: str) -> None:
    """Draw evaluation losses, and write the first and the lowest as numbers."""
    known = [(entry["step"], entry["eval_loss"]) for entry in evaluations if entry["eval_loss"] is not None]
    if not known:
        return
    style = {"marker": "o", "markersize": 3 + width, "linestyle": "--", "linewidth": width - 0.5}
    axes.plot(*zip(*known, strict=True), color=colour, label=label, **style)
    for step, loss in {known[0], min(known, key=lambda point: point[1])}:
        axes.annotate(
            f"{loss:.3f}", (step, loss), xytext=(0, 7), textcoords="offset points", ha="center", va="bottom",
            color=colour, fontweight="bold", bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def number(value: float | None) -> float:
    """A number of the record: null stands for one that is not finite."""
    return math.nan if value is None else value


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and those before it, `window` of them in all: ([2, 4, 6], 2) -> [2, 3, 5]"""
    known = ~np.isnan(values)
    sums, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0).tolist()
