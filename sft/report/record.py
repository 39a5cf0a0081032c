"""Keep the record of a run, run_report.json (its fields: docs/run_report.md), without secrets, and its picture."""

import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from sft import VERSION
from sft.job import commit, rank, say, world_size
from sft.outside import is_secret, read_object, without_password
from sft.report.picture import draw

REPORT_NAME, PICTURE_NAME = "run_report.json", "loss.png"
PHASES = "start data plan load train rehearsal first_step steps checkpoints evaluate report save proof end".split()
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "deepspeed", "peft", "liger-kernel")


class Report:
    """The record of a run, filled as the run goes. Rank 0 keeps it in `output_dir`, once training has begun."""

    def __init__(self, model_args: Any, data_args: Any, training_args: Any):
        self.model_args, self.data_args = model_args, data_args
        self.folder = Path(str(training_args.output_dir))
        self.complete = False  # True when the last step of the schedule has run
        self.secrets = _secrets(vars(training_args), os.environ)  # those of the flags and of the environment
        self.record: dict[str, Any] = {
            "format": 1,
            "status": "unfinished",
            "started_at": _now(),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "flags": {"model": asdict(model_args), "data": asdict(data_args), "training": training_args.to_dict()},
            "versions": _versions(),
            "hardware": _hardware(training_args.device),
            "log": [],
            "evaluations": [],
            "samples": [],
            "durations_s": {},
        }
        # the phase that runs, and since when; processes know their birth by the wall clock
        self._phase, self._since = "start", time.perf_counter() - (time.time() - psutil.Process().create_time())
        self._cost = dict.fromkeys((REPORT_NAME, PICTURE_NAME), (0.0, 0.0))  # name -> (when it was written, seconds)
        self._failed: set[str] = set()

    def note(self, section: str, **values: Any) -> None:
        """Put facts under a section of the record: note("attention", name="sdpa", reason="cpu")."""
        self.record.setdefault(section, {}).update(values)

    def note_facts(self, model: Any, tokenizer: Any, datasets: dict[str, Any], template: str, **settled: dict) -> None:
        """Note what is known before the first step.

        Args:
            datasets: "train" and "eval", which may be None; each knows its `counts` and its `parts`.
            settled: whole sections by their names, such as batch, precision, attention and throughput.
        """
        flags = self.data_args
        columns = {"messages": flags.messages} if flags.messages else {"source": flags.source, "target": flags.target}
        for name, dataset in datasets.items():
            if dataset is not None:
                origin = {"path": ", ".join(f"{part.path}*{part.times:g}".removesuffix("*1") for part in dataset.parts)}
                origin["blake2b"] = ", ".join(part.rows.key()["file"] for part in dataset.parts)
                self.note("data", **{name: origin | columns | dataset.counts})
        digest = datasets["train"].parts[0].rows.key()["tokenizer"]
        name = self.model_args.model_name_or_path
        sizes = {
            "parameters": model.num_parameters(),
            "trainable_parameters": model.num_parameters(only_trainable=True),
        }
        self.record |= {
            "template": {"name": flags.prompt_template, "text": template},
            "tokenizer": {"class": type(tokenizer).__name__, "vocabulary": len(tokenizer), "blake2b": digest},
            "model": {"class": type(model).__name__, "name": name, **sizes},
            **settled,
        }
        self.record["attention"]["name"] = settled["attention"]["name"] or model.config._attn_implementation

    def keep_samples_until(self, step: int) -> None:
        """Take over the samples up to this step from the record that a resumed run continues."""
        path = self.folder / REPORT_NAME
        if not path.is_file():
            return
        try:
            earlier = read_object(path)["samples"]
            self.record["samples"] = [sample for sample in earlier if sample["step"] <= step]
        except (OSError, ValueError, KeyError, TypeError):
            say(f"warning: {path} cannot be read: the samples of the steps before {step} are not kept")

    def finish(self, summary: dict[str, float]) -> None:
        """Close the record after the model is saved: the rates over the whole run, and the last writing."""
        self.note("final", **summary)
        self.record["status"] = "finished" if self.complete else "stopped"
        self.write()

    def enter(self, phase: str) -> str:
        """Charge the seconds since the last call to the phase that ran, and begin this one. Returns that phase."""
        ran, now = self._phase, time.perf_counter()
        durations = self.record["durations_s"]
        durations[ran] = durations.get(ran, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return ran

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge a `with` block to a phase of its own, and not to the one around it."""
        # a rehearsal is one phase, whatever it tries
        outer = self.enter("rehearsal" if self._phase == "rehearsal" else name)
        try:
            yield
        finally:
            self.enter(outer)

    def move_seconds(self, phase: str, seconds: float) -> None:
        """Charge seconds that have passed to this phase, and not to the one that runs."""
        self.enter(self._phase)
        durations = self.record["durations_s"]
        durations[phase] = durations.get(phase, 0.0) + seconds
        durations[self._phase] -= seconds

    def phases(self) -> str:
        """seconds: start 7.1, data 1.2, …, end 0.3; 94.2 in all"""
        self.enter(self._phase)
        durations = self.record["durations_s"]
        shown = sorted(durations.items(), key=lambda item: PHASES.index(item[0]))
        parts = ", ".join(f"{phase.replace('_', ' ')} {seconds:.1f}" for phase, seconds in shown)
        return f"seconds: {parts}; {sum(durations.values()):.1f} in all"

    def write(self, spare: bool = False) -> None:
        """Write the record and the picture. A failure is printed once and stops nothing.

        Args:
            spare: write only what is due: ten seconds after the last time, and 400 times what that took.
        """
        if rank() != 0:
            return
        self.record["updated_at"] = _now()
        self.enter(self._phase)
        picture = partial(draw, {self.folder.resolve().name: self.record}, self.folder / PICTURE_NAME)
        for name, action in ((REPORT_NAME, self._write_record), (PICTURE_NAME, picture)):
            written, seconds = self._cost[name]
            began = time.perf_counter()
            if spare and began - written < max(10.0, 400 * seconds):
                continue
            try:
                action()
            except Exception as error:  # never end a training run because of a picture; the error is printed once
                if name not in self._failed:
                    self._failed.add(name)
                    say(f"warning: {self.folder / name} was not written: {type(error).__name__}: {error}")
            # the first picture imports matplotlib, before the first step: its cost says nothing of the next one
            self._cost[name] = (time.perf_counter(), time.perf_counter() - began if written else 0.0)

    def _write_record(self) -> None:
        text = json.dumps(_clean(self.record, self.secrets), indent=1, ensure_ascii=False, allow_nan=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".{REPORT_NAME}.tmp"
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, self.folder / REPORT_NAME)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found | {"version": VERSION, "commit": commit()}


def _hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"ranks": world_size(), "device": device.type}
    if device.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(device)
        found["device_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    else:  # the processor's name, its architecture where the system does not tell
        text = Path("/proc/cpuinfo").read_text(errors="replace") if sys.platform == "linux" else ""
        named = re.search(r"^model name\s*:(.*)", text, re.M)
        found["device_name"] = named[1].strip() if named else platform.processor() or platform.machine()
    # sched_getaffinity exists on Linux only
    return found | {"cpu_count": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()}


REMOVED = "(removed)"


def _secrets(*sources: Mapping[str, Any]) -> set[str]:
    """Values under secret names. They must not appear anywhere in the record."""
    named = {
        value for source in sources for name, value in source.items() if is_secret(name) and isinstance(value, str)
    }
    return {value for value in named if len(value) >= 8}  # a short one ("1", "true") would blank out innocent text


def _clean(value: Any, secrets: set[str], name: str = "") -> Any:
    """The value as strict JSON holds it: secrets removed, numbers that are not finite as null, other types as text."""
    if isinstance(value, dict):
        return {str(key): _clean(item, secrets, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_clean(item, secrets, name) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    text = REMOVED if is_secret(name) and str(value) else str(value)
    for secret in secrets:
        text = text.replace(secret, REMOVED)
    return without_password(text, REMOVED)
