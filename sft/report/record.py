"""The record of a run: run_report.json, what each of its fields means, and what must never be in it."""

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

import torch
import transformers

from sft.job import rank, say, world_size

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
    "hardware.device_name": "as the driver gives it; a CPU's as the kernel does",
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
    "attention.name": "the kernel that ran",
    "attention.reason": "why it was chosen",
    "memory_plan.tokens_per_micro_batch?": "tokens of the largest micro-batch that the plan is for; no section without LLaMA's names",
    "memory_plan.gpu_peak_gib?": "planned peak of PyTorch's allocator on one GPU, GiB",
    "memory_plan.host_peak_gib?": "planned peak of one machine's host memory, GiB",
    "memory_plan.gpu_gib.*?": "its parts, GiB",
    "memory_plan.host_gib.*?": "its parts, GiB",
    "memory_plan.fits?": "whether both are there",
    "packing.per_device?": "as under `batch`; the whole section is absent in a padded run",
    "packing.accumulation?": "as under `batch`",
    "packing.max_length?": "--model_max_length, tokens",
    "packing.max_tokens?": "tokens that a micro-batch may hold",
    "packing.micro_batches?": "micro-batches of each rank in each optimizer step",
    "packing.fullest?": "tokens of the largest micro-batch",
    "packing.fill?": "tokens / (micro-batches x the largest one), 0 to 1, over the first epoch",
    "packing.padding_saved?": "share of the padded run's positions that would be padding, 0 to 1, over the first epoch",
    "packing.reason?": "why max_tokens is what it is",
    "packing.line?": "all of it, as printed",
    "packing.shared_prefixes?": "whether what prompts begin with alike is computed once, and why, as printed",
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
    "log[].shared_share": "tokens of examples that were computed in another example, 0 to 1 (--share_prefixes)",
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
    "samples[].cut": "true where the answer had not ended when it reached its longest length",
    "durations_s.data": "seconds, like all durations of the last process of the run: reading and tokenizing the rows",
    "durations_s.load": "seconds: tokenizer and model",
    "durations_s.train": "seconds: from the rehearsal to the last step, evaluations and checkpoints included",
    "durations_s.rehearsal?": "seconds of `train` in the save rehearsal",
    "durations_s.checkpoints?": "seconds of `train` in checkpoints: gathering, writing, hashing; the rehearsal's included",
    "durations_s.evaluate?": "seconds of `train` in evaluations, samples included",
    "durations_s.save?": "seconds: the export; absent when the run was stopped before",
    "durations_s.proof?": "seconds: reading the export back and comparing it",
    "durations_s.report": "seconds of `train` that writing this file, the picture and the live line took",
    "final.steps": "optimizer steps done",
    "final.train_loss": "mean over all steps of this process",
    "final.eval_loss?": "of the exported model: at best_step, else of the last evaluation",
    "final.eval_perplexity?": "exp(eval_loss)",
    "final.best_step?": "step of the best checkpoint, where --load_best_model_at_end chose it",
    "final.train_steps_s": "seconds in optimizer steps, evaluations and saves left out",
    "final.tokens": "tokens of examples, all ranks",
    "final.trained_tokens": "tokens with a label, all ranks",
    "final.model_flops": "FLOPs by `mfu_convention`, all ranks",
    "final.tokens_per_s_per_gpu": "over the whole run, like all rates under `final`",
    "final.trained_tokens_per_s_per_gpu": "see `log`",
    "final.padding_share": "see `log`",
    "final.shared_share": "see `log`",
    "final.tflops_per_gpu": "see `log`",
    "final.mfu?": "see `log`",
    "final.mfu_6n?": "see `log`",
    "final.peak_memory_gib": "see `log`",
}


PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "pandas", "deepspeed", "peft", "liger-kernel")


class Report:
    """The record of a run, built as the run goes and kept in `output_dir/run_report.json` by rank 0.

    Nothing is written before training begins.

    Args:
        model_args, data_args, training_args: the parsed flags.
        draw: ({name of the run: its record}, file) -> None; draws the picture that is kept beside the record.
    """

    def __init__(
        self,
        model_args: Any,
        data_args: Any,
        training_args: transformers.TrainingArguments,
        draw: Callable[[dict[str, dict], Path], None],
    ):
        self.model_args, self.data_args = model_args, data_args
        self.folder = Path(str(training_args.output_dir))
        self.draw = draw
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
        self,
        trainer: Any,
        template: str,
        batch: dict[str, int],
        precision: dict[str, str],
        attention_reason: str,
    ) -> None:
        """Note what is settled before the first step: the data, the tokenizer, the model, the arithmetic, the types.

        Args:
            trainer: a `SupervisedTrainer`; its datasets know their `rows.key()` and `counts`; its `meter` knows the peak and the convention.
            template: the text around the instruction.
            batch, precision: the sections of these names.
            attention_reason: why the model's kernel was chosen.
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
        self.note("attention", name=model.config._attn_implementation, reason=attention_reason)
        self.note("throughput", mfu_convention=trainer.meter.convention)
        if trainer.meter.peak_tflops is not None:
            self.note("throughput", peak_tflops=trainer.meter.peak_tflops)

    def keep_samples_until(self, step: int) -> None:
        """Take over the samples up to this step from the record that a resumed run continues."""
        path = self.folder / REPORT_NAME
        if not path.is_file():
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))["samples"]
            self.record["samples"] = [sample for sample in earlier if sample["step"] <= step]
        except (ValueError, KeyError, TypeError):
            say(f"warning: {path} cannot be read: the samples of the steps before {step} are not kept")

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
            spare: write only what has become due: ten seconds after the last time, and 400 times what that took.
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
            # the first picture imports matplotlib, before the first step: no measure of the next one
            self._cost[name] = (time.perf_counter(), time.perf_counter() - began if written else 0.0)

    def _write_record(self) -> None:
        text = json.dumps(_clean(self.record, self.secrets), indent=1, ensure_ascii=False, allow_nan=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f".{REPORT_NAME}.tmp"
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self.folder / REPORT_NAME)

    def _draw(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.draw({self.folder.resolve().name: self.record}, self.folder / PICTURE_NAME)


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
    found: dict[str, Any] = {"ranks": world_size(), "device": device.type, "device_name": _cpu_name()}
    if device.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(device)
        found["device_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    # sched_getaffinity exists on Linux only
    found["cpu_count"] = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return found


def _cpu_name() -> str:
    """The processor's name, its architecture where the system does not say."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
