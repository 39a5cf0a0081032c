"""What a person sees of a run: the live line, run_report.json, loss.png; and runs compared.

Two runs on one figure and side by side, and what each field of run_report.json means:

    python -m sft.report RUN_A RUN_B --output compare.png
    python -m sft.report --fields
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from sft.arguments import UserError, one_message_for_user_errors, rank, say, world_size

REPORT_NAME = "run_report.json"
PICTURE_NAME = "loss.png"

# Every field of run_report.json: `a.b` is a key in an object, `[]` each element of a list, `*` any key. A field that
# ends in `?` is absent where it does not apply. A number that is not finite is written as null.
FIELDS = {
    "format": "version of this table: 1. Fields are added under it; none is renamed or removed",
    "status": "'unfinished' until the run reaches its end, then 'finished', or 'stopped' if it ended before its last step",
    "started_at": "UTC, ISO 8601",
    "updated_at": "UTC, ISO 8601: when this file was last written",
    "command": "the command line, secrets removed",
    "flags.*.*": "every flag as resolved, under `model`, `data` and `training`; secrets removed",
    "versions.*": "Python, PyTorch, the other packages that took part, and `commit`, this project's git commit",
    "hardware.ranks": "processes in the job",
    "hardware.device": "'cuda', 'cpu', ...",
    "hardware.device_name": "as the driver gives it",
    "hardware.device_memory_gib?": "GiB of one GPU",
    "hardware.cpu_count": "cores of this machine that rank 0 may use",
    "data.train.*": "where the rows came from (`path`, `blake2b` of its bytes, columns) and how many passed each filter",
    "data.eval.*?": "the same for the evaluation rows",
    "template.name": "--prompt_template",
    "template.text": "the template itself, with {instruction} where the prompt goes",
    "tokenizer.*": "`class`, `vocabulary` (ids), `blake2b` of everything that decides its ids",
    "model.name": "--model_name_or_path",
    "model.class": "of the model in transformers",
    "model.parameters": "elements of all weights",
    "model.trainable_parameters": "elements of the weights that are trained",
    "batch.ranks": "processes in the job",
    "batch.per_device": "--per_device_train_batch_size, examples",
    "batch.accumulation": "--gradient_accumulation_steps as given",
    "batch.examples_per_step": "examples of one optimizer step: the product of the three above",
    "batch.steps_per_epoch": "optimizer steps of one pass over the data",
    "batch.steps": "optimizer steps of the run",
    "precision.*": "types of parameters, gradients, optimizer state, computation and export",
    "attention.name?": "the kernel that ran",
    "attention.reason?": "why it was chosen",
    "packing.*?": "what was asked, what ran, fill and padding saved; `line` is the printed one",
    "throughput.mfu_convention": "which FLOPs `mfu` counts; `mfu_6n` counts 6 N tokens + 12 layers heads head_dim len^2",
    "throughput.peak_tflops?": "the device's dense 16-bit peak, TFLOP/s, that MFU refers to; absent where it is unknown",
    "log[].step": "optimizer steps done",
    "log[].epoch": "passes over the data done",
    "log[].loss": "mean over the trained tokens of each step, all ranks; mean over the steps since the last entry",
    "log[].learning_rate": "of the last step",
    "log[].grad_norm?": "of the last step, before clipping",
    "log[].step_time_s": "seconds for each optimizer step, evaluations and saves left out",
    "log[].tokens_per_s_per_gpu": "tokens of examples (no padding) per second and rank; a CPU process counts as one GPU",
    "log[].trained_tokens_per_s_per_gpu": "the same for tokens with a label",
    "log[].padding_share": "computed positions that are padding, 0 to 1",
    "log[].tflops_per_gpu": "model FLOPs by `mfu_convention`, TFLOP per second and rank",
    "log[].mfu?": "tflops_per_gpu / peak_tflops, 0 to 1",
    "log[].mfu_6n?": "the same by the formula 6 N tokens + 12 layers heads head_dim len^2, 0 to 1",
    "log[].peak_memory_gib": "GiB, highest of all ranks so far: CUDA's allocator, on a CPU the resident set",
    "evaluations[].step": "optimizer steps done",
    "evaluations[].epoch": "passes over the data done",
    "evaluations[].eval_loss": "mean over all trained tokens of the evaluation rows",
    "evaluations[].eval_perplexity": "exp(eval_loss)",
    "evaluations[].eval_tokens": "trained tokens that the mean is over",
    "evaluations[].eval_runtime": "seconds",
    "evaluations[].*?": "rates that the Trainer adds",
    "samples[].step": "optimizer steps done",
    "samples[].prompt": "an evaluation prompt as the model receives it",
    "samples[].reference": "the response in the data",
    "samples[].answer": "the model's greedy answer at this step",
    "durations_s.data": "seconds: reading, tokenizing",
    "durations_s.load": "seconds: tokenizer and model",
    "durations_s.rehearsal?": "seconds: the save rehearsal",
    "durations_s.train": "seconds: from the first step to the last, evaluations and checkpoints included",
    "durations_s.evaluate?": "seconds of `train` in evaluations, samples included",
    "durations_s.save": "seconds: export and its proof",
    "durations_s.report": "seconds of `train` that writing this file, the picture and the live line took",
    "final.steps": "optimizer steps done",
    "final.train_loss": "mean over all steps of this process",
    "final.eval_loss?": "of the last evaluation",
    "final.eval_perplexity?": "of the last evaluation",
    "final.best_step?": "step of the best checkpoint, where --load_best_model_at_end chose it",
    "final.train_steps_s": "seconds in optimizer steps, evaluations and saves left out",
    "final.tokens": "tokens of examples, all ranks",
    "final.trained_tokens": "tokens with a label, all ranks",
    "final.model_flops": "FLOPs by `mfu_convention`, all ranks",
    "final.tokens_per_s_per_gpu": "over the whole run, like all rates under `final`",
    "final.trained_tokens_per_s_per_gpu": "see `log`",
    "final.padding_share": "see `log`",
    "final.tflops_per_gpu": "see `log`",
    "final.mfu?": "see `log`",
    "final.mfu_6n?": "see `log`",
    "final.peak_memory_gib": "see `log`",
}
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "pandas", "deepspeed", "peft", "liger-kernel")


# ------------------------------------------------------------------------------------------------------- the record


class Report:
    """The record of a run, built as the run goes and kept in `output_dir/run_report.json` by rank 0.

    Args:
        model_args, data_args, training_args: the parsed flags.
        folder: the output folder. It is written to when training begins, not before.
    """

    def __init__(self, model_args: Any, data_args: Any, training_args: transformers.TrainingArguments):
        self.model_args, self.data_args = model_args, data_args
        self.folder = Path(training_args.output_dir)
        self.complete = False  # True when the last step of the schedule has run
        self.secrets = _secrets(training_args)
        self.record: dict[str, Any] = {
            "format": 1,
            "status": "unfinished",
            "started_at": _now(),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "flags": {
                "model": dataclasses.asdict(model_args),
                "data": dataclasses.asdict(data_args),
                "training": training_args.to_dict(),
            },
            "versions": _versions(),
            "hardware": _hardware(training_args.device),
            "log": [],
            "evaluations": [],
            "samples": [],
            "durations_s": {},
        }
        self._cost = dict.fromkeys((REPORT_NAME, PICTURE_NAME), (0.0, 0.0))  # name -> (when it was written, seconds)
        self._failed: set[str] = set()

    def note(self, section: str, **values: Any) -> None:
        """Put facts under a section of the record: note("attention", name="sdpa", reason="cpu")."""
        self.record.setdefault(section, {}).update(values)

    def note_facts(
        self, trainer: transformers.Trainer, template: str, batch: dict[str, int], precision: dict[str, str]
    ) -> None:
        """Note what is settled before the first step: the data, the tokenizer, the model, the arithmetic, the types.

        Args:
            trainer: its datasets know their `rows.key()` and `counts`; its `meter` knows the peak and the convention.
            template: the text around the instruction.
            batch, precision: the sections of these names.
        """
        model_args, data_args, model, tokenizer = (
            self.model_args,
            self.data_args,
            trainer.model,
            trainer.processing_class,
        )
        columns = {"source": data_args.source, "target": data_args.target}
        sets = [("train", trainer.train_dataset, data_args.data_path)]
        if trainer.eval_dataset is not None:
            sets.append(("eval", trainer.eval_dataset, data_args.eval_data_path or data_args.data_path))
        for name, dataset, path in sets:
            digest = dataset.rows.key()["csv"]
            self.note("data", **{name: {"path": path, "blake2b": digest, **columns, **dataset.counts}})
        self.note("template", name=data_args.prompt_template, text=template)
        self.note(
            "tokenizer",
            **{"class": type(tokenizer).__name__},
            vocabulary=len(tokenizer),
            blake2b=trainer.train_dataset.rows.key()["tokenizer"],
        )
        self.note(
            "model",
            **{"class": type(model).__name__},
            name=model_args.model_name_or_path,
            parameters=model.num_parameters(),
            trainable_parameters=model.num_parameters(only_trainable=True),
        )
        self.note("batch", **batch)
        self.note("precision", **precision)
        self.note("throughput", mfu_convention=trainer.meter.convention)
        if trainer.meter.peak_tflops is not None:
            self.note("throughput", peak_tflops=trainer.meter.peak_tflops)

    def finish(self, summary: dict[str, float]) -> None:
        """Close the record after the model is saved: the rates over the whole run, and the last writing."""
        self.note("final", **summary)
        self.record["status"] = "finished" if self.complete else "stopped"
        self.write()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of a `with` block to durations_s."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - began)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add seconds to one of durations_s."""
        self.record["durations_s"][name] = self.record["durations_s"].get(name, 0.0) + seconds

    def write(self, spare: bool = False) -> None:
        """Write the record and the picture. Failing to is said once and stops nothing.

        Args:
            spare: write only what has become due, so that each costs less than 1/400 of the run's time.
        """
        if rank() != 0:
            return
        self.record["updated_at"] = _now()
        for name, action in ((REPORT_NAME, self._write_record), (PICTURE_NAME, self._draw)):
            written, seconds = self._cost[name]
            began = time.perf_counter()
            if spare and began - written < max(10.0, 400 * seconds):
                continue
            try:
                action()
            except Exception as error:  # hours of training must not end for a picture; it is said, not hidden
                if name not in self._failed:
                    self._failed.add(name)
                    say(f"warning: {self.folder / name} was not written: {type(error).__name__}: {error}")
            self._cost[name] = (time.perf_counter(), time.perf_counter() - began)

    def _write_record(self) -> None:
        text = json.dumps(_clean(self.record, self.secrets), indent=1, ensure_ascii=False, allow_nan=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f".{REPORT_NAME}.tmp"
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self.folder / REPORT_NAME)

    def _draw(self) -> None:
        if self.record["log"]:
            self.folder.mkdir(parents=True, exist_ok=True)
            draw({self.folder.name: self.record}, self.folder / PICTURE_NAME)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "not a git checkout"
    return found


def _hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"ranks": world_size(), "device": device.type, "device_name": platform.machine()}
    if device.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(device)
        found["device_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    # sched_getaffinity exists on Linux only
    found["cpu_count"] = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return found


SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "passwd", "credential", "credentials"}
REMOVED = "(removed)"


def _is_secret(name: str) -> bool:
    """hub_token, WANDB_API_KEY -> True; tokens_per_micro_batch, tokenizer -> False"""
    return not SECRET_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _secrets(training_args: transformers.TrainingArguments) -> set[str]:
    """Values that must not appear anywhere in the record: those of secret flags and of secret environment variables."""
    flags = {f.name: getattr(training_args, f.name, None) for f in dataclasses.fields(training_args)}
    named = [value for source in (flags, os.environ) for name, value in source.items() if _is_secret(name)]
    # a short value ("1", "true") would blank out innocent text
    return {value for value in named if isinstance(value, str) and len(value) >= 8}


def _clean(value: Any, secrets: set[str], name: str = "") -> Any:
    """The value as strict JSON holds it: secrets removed, numbers that are not finite as null, other types as text."""
    if isinstance(value, dict):
        return {str(key): _clean(item, secrets, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_clean(item, secrets, name) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    text = str(value)
    if _is_secret(name) and text:
        return REMOVED
    for secret in secrets:
        text = text.replace(secret, REMOVED)
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", REMOVED, text)  # a user and password in an address


# ---------------------------------------------------------------------------------------------------- the live line


class ReportCallback(transformers.TrainerCallback):
    """Prints the live line, and fills and writes the record. Replaces the Trainer's own printer and progress bar.

    In a terminal a progress bar stands under the lines; in a file there are lines alone.
    """

    def __init__(self, report: Report):
        self.report = report
        self.bar: tqdm | None = None
        self.first: tuple[float, int] | None = None  # when and at which step the first line was printed

    def on_train_begin(self, args, state, control, **kwargs):
        record = self.report.record
        if state.global_step:  # resumed: the numbers are in the Trainer's state, the samples in the report
            record["samples"] = [s for s in _samples_before(self.report.folder) if s["step"] <= state.global_step]
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")
        self._record_numbers(state)
        self.report.write()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.set_postfix_str("evaluating")

    def on_log(self, args, state, control, logs=None, **kwargs):
        began = time.perf_counter()
        if "loss" in logs:
            left = self._seconds_left(began, state, logs)
            self._print(live_line(logs, state.global_step, state.max_steps, left, args.device.type))
        if "eval_loss" in logs:
            self._print(evaluation_line(logs, state))
            self.report.add_seconds("evaluate", logs["eval_runtime"])
        if "train_runtime" in logs:
            minutes = clock(logs["train_runtime"])
            self._print(f"trained to step {state.global_step} in {minutes}: mean loss {logs['train_loss']:.4f}")
            self.report.note("final", steps=state.global_step, train_loss=logs["train_loss"])
        if state.is_world_process_zero:
            self._record_numbers(state)
            self.report.write(spare=True)
        self.report.add_seconds("report", time.perf_counter() - began)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.set_postfix_str("")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if state.best_global_step is not None and args.load_best_model_at_end:
            self.report.note("final", best_step=state.best_global_step)
        for entry in reversed(self.report.record["evaluations"]):
            self.report.note("final", eval_loss=entry["eval_loss"], eval_perplexity=entry["eval_perplexity"])
            break
        self.report.complete = state.global_step >= state.max_steps

    def _record_numbers(self, state: transformers.TrainerState) -> None:
        entries = state.log_history
        self.report.record["log"] = [dict(entry) for entry in entries if "loss" in entry]
        self.report.record["evaluations"] = [dict(entry) for entry in entries if "eval_loss" in entry]

    def _seconds_left(self, now: float, state: transformers.TrainerState, logs: dict[str, float]) -> float:
        remaining = state.max_steps - state.global_step
        if self.first is None:
            self.first = (now, state.global_step)
        when, step = self.first
        if state.global_step == step:
            return remaining * logs["step_time_s"]
        return remaining * (now - when) / (state.global_step - step)  # evaluations and saves at their share so far

    def _print(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line)
        else:
            say(line)


def replace_progress(trainer: transformers.Trainer, *callbacks: transformers.TrainerCallback) -> None:
    """Take out the Trainer's own printer and progress bar and put these callbacks last."""
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)


def live_line(logs: dict[str, float], step: int, steps: int, seconds_left: float, device_type: str) -> str:
    """step 40/300  loss 1.2345  lr 1.98e-05  grad 0.91  65,883 tok/s/GPU (31,204 trained)  padding 0.0%  MFU 41.3% ..."""
    where = "GPU" if device_type == "cuda" else "process"
    parts = [f"step {step:>{len(str(steps))}}/{steps}", f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
    if "grad_norm" in logs:
        parts.append(f"grad {logs['grad_norm']:.2f}")
    real, trained = logs["tokens_per_s_per_gpu"], logs["trained_tokens_per_s_per_gpu"]
    parts += [
        f"{real:,.0f} tok/s/{where} ({trained:,.0f} trained)",
        f"padding {logs['padding_share']:.1%}",
        f"MFU {logs['mfu']:.1%}" if "mfu" in logs else "MFU peak unknown",
        f"mem {logs['peak_memory_gib']:.2f} GiB",
        f"left {clock(seconds_left)}",
    ]
    return "  ".join(parts)


def evaluation_line(logs: dict[str, float], state: transformers.TrainerState) -> str:
    """evaluation at step 40: loss 1.2345 (lowest so far), perplexity 3.44 over 12,345 trained tokens, 3.1 s"""
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    best = " (lowest so far)" if logs["eval_loss"] <= min(losses) and len(losses) > 1 else ""
    return (
        f"evaluation at step {state.global_step}: loss {logs['eval_loss']:.4f}{best}, "
        f"perplexity {logs['eval_perplexity']:.4g} over {logs['eval_tokens']:,.0f} trained tokens, "
        f"{logs['eval_runtime']:.1f} s"
    )


def clock(seconds: float) -> str:
    """59.4 -> 0:59; 3725 -> 1:02:05"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _samples_before(folder: Path) -> list[dict]:
    """The samples of the report that this run goes on from."""
    path = folder / REPORT_NAME
    return json.loads(path.read_text(encoding="utf-8"))["samples"] if path.is_file() else []


# -------------------------------------------------------------------------------------------------------- trackers

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


def tracker_problems(flags: Any) -> list[str]:
    """Problems of --report_to that can be known from the flags: a tracker that does not exist or is not installed."""
    asked = [flags.report_to] if isinstance(flags.report_to, str) else list(flags.report_to or [])
    known = transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK
    present = transformers.integrations.get_available_reporting_integrations()
    problems = []
    for name in asked:
        if name in ("none", "all") or name in present:
            continue
        if name not in known:
            problems.append(f"--report_to {name}: no such tracker. Known: {', '.join(sorted(known))}, all, none.")
        else:
            cure = f"Install it (pip install {TRACKERS.get(name, name)}) or remove the flag."
            problems.append(f"--report_to {name}: the package is not installed. {cure}")
    return problems


# --------------------------------------------------------------------------------------------------------- pictures

COLOURS = ("#1f5fa8", "#d1572b", "#2c8a57", "#8b4fa8", "#9a7a1c", "#4a4a4a")


def draw(runs: dict[str, dict], path: Path) -> None:
    """Draw the loss, the learning rate and the tokens per second of runs on one figure (PNG).

    Args:
        runs: name -> record of the run, as in run_report.json.
        path: the file; it is replaced in one go.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    loss, rate, speed = (figure.add_subplot(grid[place]) for place in ((0, slice(None)), (1, 0), (1, 1)))

    for (name, record), colour in zip(runs.items(), COLOURS * len(runs)):
        log, evaluations = record["log"], record["evaluations"]
        steps = [entry["step"] for entry in log]
        losses = [_number(entry["loss"]) for entry in log]
        label = f"{name}: " if len(runs) > 1 else ""
        window = max(1, len(steps) // 20)
        loss.plot(steps, losses, color=colour, alpha=0.3 if window > 1 else 1, linewidth=1, label=f"{label}train")
        if window > 1:
            smooth = _running_mean(losses, window)
            loss.plot(steps, smooth, color=colour, linewidth=2, label=f"{label}train, mean of {window} logged values")
        if evaluations:
            loss.plot(
                [entry["step"] for entry in evaluations],
                [_number(entry["eval_loss"]) for entry in evaluations],
                color=COLOURS[1] if len(runs) == 1 else colour,
                marker="o",
                markersize=5,
                linestyle="--",
                linewidth=1.5,
                label=f"{label}evaluation",
            )
        rate.plot(steps, [entry["learning_rate"] for entry in log], color=colour, linewidth=1.5)
        speed.plot(steps, [entry["tokens_per_s_per_gpu"] for entry in log], color=colour, linewidth=1.5)

    title = ", ".join(f"{name} (unfinished)" if r["status"] == "unfinished" else name for name, r in runs.items())
    loss.set(title=title, ylabel="loss per trained token")
    rate.set(xlabel="optimizer step", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    speed.set(xlabel="optimizer step", ylabel=f"tokens/s per {_unit(runs)}")
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    speed.set_ylim(bottom=0)
    for axes in (loss, rate, speed):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    loss.legend(frameon=False)
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, format="png")
    os.replace(beside, path)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _unit(runs: dict[str, dict]) -> str:
    kinds = {record["hardware"]["device"] for record in runs.values()}
    return "process" if kinds == {"cpu"} else "GPU"


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and those before it, `window` of them in all: ([2, 4, 6], 2) -> [2, 3, 5]"""
    known = ~np.isnan(values)
    sums, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0).tolist()


# -------------------------------------------------------------------------------------------------- runs compared


def load_runs(folders: list[str]) -> dict[str, dict]:
    """Read the reports of runs: name -> record.

    Raises:
        UserError: with a message for each folder that has no report, or one in which no step was logged.
    """
    runs, problems = {}, []
    short = [Path(folder).resolve().name for folder in folders]
    for folder, name in zip(folders, short):
        path = Path(folder) / REPORT_NAME
        if not path.is_file():
            problems.append(f"{folder}: there is no {REPORT_NAME} in it. Give the --output_dir of a run that trained.")
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"{path}: not a report of a run ({error}).")
            continue
        if not isinstance(record, dict) or record.get("format") != 1:
            problems.append(f"{path}: not a report that this version reads (format 1).")
        elif not record["log"]:
            problems.append(f"{path}: the run is {record['status']} and logged no step: there is nothing to draw.")
        else:
            runs[name if short.count(name) == 1 else folder] = record
    if problems:
        raise UserError(problems)
    return runs


def comparison(runs: dict[str, dict]) -> str:
    """The runs as a Markdown table, and how far their losses lie apart at the steps that both logged."""
    rows: dict[str, Callable[[dict], Any]] = {
        "status": lambda r: r["status"],
        "steps logged to": lambda r: r["log"][-1]["step"],
        "last train loss": lambda r: f"{_number(r['log'][-1]['loss']):.4f}",
        "last eval loss": lambda r: f"{_number(r['evaluations'][-1]['eval_loss']):.4f}" if r["evaluations"] else "",
        "examples per step": lambda r: r.get("batch", {}).get("examples_per_step", ""),
        "tokens/s per GPU (median)": lambda r: f"{_median(r, 'tokens_per_s_per_gpu'):,.0f}",
        "padding (median)": lambda r: f"{_median(r, 'padding_share'):.1%}",
        "MFU (median)": lambda r: f"{_median(r, 'mfu'):.1%}" if "mfu" in r["log"][-1] else "peak unknown",
        "peak memory, GiB": lambda r: f"{r['log'][-1]['peak_memory_gib']:.2f}",
    }
    lines = ["| | " + " | ".join(runs) + " |", "|---|" + "---:|" * len(runs)]
    lines += [f"| {name} | " + " | ".join(str(read(r)) for r in runs.values()) + " |" for name, read in rows.items()]
    first, *others = runs
    for other in others:
        a, b = ({entry["step"]: _number(entry["loss"]) for entry in runs[name]["log"]} for name in (first, other))
        shared = [step for step in a if step in b]
        if shared:
            worst = max(shared, key=lambda step: abs(a[step] - b[step]))
            lines.append(
                f"\n{first} and {other}: {len(shared)} steps in both logs, losses differ by at most "
                f"{abs(a[worst] - b[worst]):.2e} (step {worst})"
            )
    return "\n".join(lines)


def _median(record: dict, name: str) -> float:
    values = sorted(entry[name] for entry in record["log"])
    return values[len(values) // 2]


def main(argv: list[str] | None = None) -> None:
    """The command: draw and compare runs."""
    parser = argparse.ArgumentParser(prog="python -m sft.report", description="Draw training runs on one figure.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="the --output_dir of a run")
    parser.add_argument("--output", default="compare.png", help="picture to write (default: compare.png)")
    parser.add_argument("--fields", action="store_true", help=f"print what each field of {REPORT_NAME} means")
    arguments = parser.parse_args(argv)
    with one_message_for_user_errors():
        if arguments.fields:
            print("\n".join(f"{name}: {meaning}" for name, meaning in FIELDS.items()))
            return
        if not arguments.runs:
            raise UserError("no run is given: python -m sft.report RUN_A RUN_B")
        runs = load_runs(arguments.runs)
        draw(runs, Path(arguments.output))
        print(comparison(runs))
        print(f"picture: {arguments.output}")


if __name__ == "__main__":
    main()
