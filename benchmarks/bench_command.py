"""Seconds from Enter to the saved model: this project's script, TRL's and the padded ancestor's, each in a process of its own.

    python benchmarks/bench_command.py --data_path rows.csv --tokenizer FOLDER                       # on a GPU: the scenarios of 1.1 B
    python benchmarks/bench_command.py --data_path rows.csv --tokenizer FOLDER --scenarios 7b_64 --variants ours --rows 640
    python benchmarks/bench_command.py --data_path rows.csv --tokenizer FOLDER --scenarios cpu --rows 64 --variants ours,ancestor

One epoch of real rows (columns prompt and response) on a model with random weights that is made here, with default flags and the same
examples in each optimizer step. `cold` has empty caches of compiled code and of tokenized rows, `warm` is the same command again. The
ancestor (--packing False) runs some steps, and its seconds are scaled to the epoch. One JSON line each: seconds by phase
(docs/run_report.md; TRL's script times its own), what of the stopwatch's seconds no phase has, tokens/s in the median step, and
how many times TRL's seconds a run's are (`times_trl`: above 1 is faster).
"""

import argparse
import contextlib
import csv
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_ladder import MODELS, make_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = MODELS | {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
}  # fmt: skip
ANCESTOR_STEPS = 4


class Scenario(NamedTuple):
    shape: str
    per_device: int
    accumulation: int
    rows: int | None = None  # of the epoch; None: as many as the file has

    @property
    def examples(self) -> int:
        return self.per_device * self.accumulation


SCENARIOS = {
    "original": Scenario("1.1B", 2, 8),
    "large": Scenario("1.1B", 16, 8),
    "rows_1000": Scenario("1.1B", 2, 8, 1_000),
    "rows_100000": Scenario("1.1B", 16, 8, 100_000),
    "7b_16": Scenario("6.7B", 2, 8, 1_600),
    "7b_64": Scenario("6.7B", 8, 8, 1_280),
    "cpu": Scenario("135M", 4, 1, 64),
    "tiny": Scenario("tiny", 4, 1, 64),
}


def make_rows(source: Path, rows: int | None, path: Path) -> int:
    """Write so many of the file's rows, again from the beginning where it has fewer; how many were written."""
    with open(source, newline="", encoding="utf-8") as file:
        header, *table = csv.reader(file)
    table = list(itertools.islice(itertools.cycle(table), rows or len(table)))
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *table])
    return len(table)


def environment(caches: Path) -> dict[str, str]:
    """Caches of compiled code and of tokenized rows in a folder of their own."""
    names = {
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "HF_HOME": "hub",
        "XDG_CACHE_HOME": "others",
    }
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {name: str(caches / folder) for name, folder in names.items()}


def run(words: list[str], caches: Path, log: Path) -> float:
    """Run a command to its end; its seconds. Raises RuntimeError with the end of what it printed."""
    with open(log, "w", encoding="utf-8") as file:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(caches)
        )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{log.read_text(errors='replace')[-3000:]}")
    return seconds


def ours(scenario: Scenario, model: Path, rows: Path, work: Path, caches: Path, *more: str) -> dict[str, Any]:
    output = work / "model"
    shutil.rmtree(output, ignore_errors=True)
    flags = f"--per_device_train_batch_size {scenario.per_device} --gradient_accumulation_steps {scenario.accumulation} --num_train_epochs 1 "
    flags += "--model_max_length 1024 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.05 --lr_scheduler_type cosine --logging_steps 1 "
    flags += f"--save_strategy no --data_cache_dir {caches / 'rows'} --bf16 {torch.cuda.is_available()}"
    where = ["--model_name_or_path", str(model), "--data_path", str(rows), "--output_dir", str(output)]
    seconds = run(["llama_training.py", *where, *flags.split(), *more], caches, work / "log")
    report = json.loads((output / "run_report.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    half = report["log"][len(report["log"]) // 2 :]
    return {
        "seconds": seconds,
        "phases": report["durations_s"],
        "steps": len(report["log"]),
        "steps_of_an_epoch": report["batch"]["steps_per_epoch"],
        "step_s": statistics.median(entry["step_time_s"] for entry in half),
        "tokens_per_s": statistics.median(entry["tokens_per_s_per_gpu"] for entry in half),
        "peak_memory_gib": report["log"][-1]["peak_memory_gib"],
        "printed": [
            line
            for line in (work / "log").read_text(errors="replace").splitlines()
            if line.startswith("captured steps")
        ],
    }


def ancestor(*how: Any) -> dict[str, Any]:
    found = ours(*how, "--packing", "False", "--max_steps", str(ANCESTOR_STEPS))
    left = found["steps_of_an_epoch"] - found["steps"]
    return found | {"scaled": True, "seconds": found["seconds"] + left * found["step_s"]}


def trl(scenario: Scenario, model: Path, rows: Path, work: Path, caches: Path) -> dict[str, Any]:
    result, output = work / "trl.json", work / "trl"
    words = ["benchmarks/trl_peer.py", model, rows, result, "epoch", scenario.examples, output]
    seconds = run([str(word) for word in words], caches, work / "log")
    shutil.rmtree(output)
    found = json.loads(result.read_text(encoding="utf-8"))
    return {"seconds": seconds, "tokens_per_s": found["tokens_per_s_per_gpu"]} | {
        name: found[name] for name in ("phases", "steps", "step_s", "peak_memory_gib")
    }


VARIANTS = {"ours": ours, "trl": trl, "ancestor": ancestor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="a CSV with columns prompt and response")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a LLaMA tokenizer's files")
    parser.add_argument("--scenarios", default="original,large", help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--variants", default="ours,trl,ancestor", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--states", default="cold,warm")
    parser.add_argument("--rows", type=int, help="rows of the epoch, in place of the scenario's")
    parser.add_argument("--flags", default="", help="more flags for this project's script")
    parser.add_argument("--work_dir", type=Path, help="for models and caches; default: a folder that is removed")
    parser.add_argument("--output", type=Path, help="a file to which the JSON lines are added")
    flags = parser.parse_args()
    work = flags.work_dir or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"date": time.strftime("%Y-%m-%d"), "device": device, "torch": torch.__version__}
    for library in ("utils", "trl"):  # their files into the machine's memory: the first run would pay for all
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    for name in flags.scenarios.split(","):
        scenario = SCENARIOS[name]
        model, rows = work / scenario.shape, work / "rows.csv"
        count = make_rows(flags.data_path, flags.rows or scenario.rows, rows)
        if not model.exists():
            make_model(model, SHAPES[scenario.shape])
            for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                (model / file).unlink(missing_ok=True)
            for file in (*flags.tokenizer.glob("tokenizer*"), *flags.tokenizer.glob("special_tokens_map.json")):
                shutil.copyfile(file, model / file.name)
        seconds_of: dict[str, float] = {}  # TRL's, by state
        variants = sorted(flags.variants.split(","), key="trl ours ancestor".split().index)
        for variant, state in itertools.product(variants, flags.states.split(",")):
            caches = work / "caches" / variant
            if state == "cold":
                shutil.rmtree(caches, ignore_errors=True)
            more = flags.flags.split() if variant == "ours" else []
            found = VARIANTS[variant](scenario, model, rows, work, caches, *more)
            if variant == "trl":
                seconds_of[state] = found["seconds"]
            known = {
                "scenario": name,
                "variant": variant,
                "state": state,
                "rows": count,
                "examples_per_step": scenario.examples,
            }
            in_phases = sum(found["phases"].values())
            if "scaled" not in found:
                found["in_no_phase_s"] = found["seconds"] - in_phases
            if state in seconds_of:
                found["times_trl"] = seconds_of[state] / found["seconds"]
            line = json.dumps(known | found | about)
            print(line, flush=True)
            if flags.output:
                with open(flags.output, "a", encoding="utf-8") as kept:
                    kept.write(line + "\n")
    if not flags.work_dir:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
