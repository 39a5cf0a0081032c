"""The original's commands on several GPUs of one machine: one stage of measurements, each within ten minutes.

    python benchmarks/bench_multi_gpu.py llama_fsdp --gpus 4 --work_dir /tmp/multi --results benchmarks/results/multi_gpu.jsonl
    python benchmarks/bench_multi_gpu.py zero2 --gpus 2 --model tiny --steps 6 --work_dir /tmp/multi --results /tmp/multi.jsonl

Weights and rows are random, of the right shapes and lengths (bench_ladder.py); --data_path takes a CSV of your own. Stages:

    llama_fsdp   the original's LLaMA command                  zero2, zero3  the same with ds_config.json, stage 2 and 3
    xgen_fsdp    the original's XGen command                   padded        llama_fsdp with --packing False
    trl          TRL's SFTTrainer at its best, FSDP            scaling       1.1B on 1, 2, 4 ... GPUs, same work for each
    restart      a rank is killed; torchrun restarts, the run resumes, and the losses are those of a run that was left alone

Each run adds a JSON line to --results, and a line for a reader is printed last. `run_multi_gpu.sh` runs all stages.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from bench_ladder import MODELS, make_model, make_rows

ROOT = Path(__file__).resolve().parent.parent
LLAMA = "--per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 2e-5"
XGEN = "--per_device_train_batch_size 1 --gradient_accumulation_steps 32 --learning_rate 1e-5"
REST = (
    "--source prompt --target response --bf16 True --num_train_epochs 3 --per_device_eval_batch_size 2 --model_max_length 1024 "
    "--evaluation_strategy no --save_strategy no --weight_decay 0. --warmup_ratio 0.05 --lr_scheduler_type cosine --logging_steps 1"
)
FSDP = '--fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer'


def launch(words: list[str], gpus: int, log: Path, *torchrun: str) -> subprocess.Popen:
    """Start a script through torchrun; what it prints goes to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}", *torchrun, *words]
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "NO_COLOR": "1"}
        )


def finish(process: subprocess.Popen, log: Path) -> str:
    """What the run printed. Raises SystemExit with the end of it when the run failed."""
    process.wait()
    printed = log.read_text(encoding="utf-8")
    if process.returncode:
        sys.exit(f"{printed[-4000:]}\n{log}: exit code {process.returncode}")
    return printed


def losses_of(report: dict) -> list[float]:
    return [entry["loss"] for entry in report["log"]]


def figures(report: dict, printed: str) -> dict:
    """The numbers of one run, from its record: medians over the second half of its steps."""
    half = report["log"][len(report["log"]) // 2 :]
    communication = re.search(r"([\d.]+)% of it with a collective under way, ([\d.]+)% with nothing else", printed)

    def median(name: str) -> float | None:
        return statistics.median(entry[name] for entry in half) if name in half[0] else None

    return {
        "tokens_per_s_per_gpu": median("tokens_per_s_per_gpu"),
        "mfu": median("mfu"),
        "mfu_6n": median("mfu_6n"),
        "peak_memory_gib": report["log"][-1]["peak_memory_gib"],
        "micro_batches": report.get("packing", {}).get("micro_batches", report["batch"]["accumulation"]),
        "examples_per_step": report["batch"]["examples_per_step"],
        "padding_share": median("padding_share"),
        "communication_share": float(communication[1]) / 100 if communication else None,
        "communication_exposed_share": float(communication[2]) / 100 if communication else None,
        "seconds": report["durations_s"],
        "losses": losses_of(report),
        "proved": (re.findall(r"proved: (.*)", printed) or [None])[-1],
    }


class Bench:
    def __init__(self, flags: argparse.Namespace):
        self.flags = flags
        self.work = flags.work_dir
        self.work.mkdir(parents=True, exist_ok=True)
        flags.results.parent.mkdir(parents=True, exist_ok=True)
        self.rows = flags.data_path or self.work / "rows.csv"
        if not self.rows.exists():
            make_rows(self.rows, 20_000)

    def model(self, name: str, **shape: int) -> Path:
        name = self.flags.model or name
        folder = self.work / "_".join([name, *(str(size) for size in shape.values())])
        if not folder.exists():
            make_model(folder, MODELS[name] | shape)
        return folder

    def words(self, script: str, model: Path, recipe: str, output: Path, *more: str) -> list[str]:
        shutil.rmtree(output, ignore_errors=True)
        words = [script, "--model_name_or_path", str(model), "--data_path", str(self.rows), "--output_dir", str(output)]
        words += [*recipe.split(), *REST.split(), "--max_steps", str(self.flags.steps), *more]
        if self.flags.gpt2_files and script.startswith("xgen"):
            words += ["--gpt2_files", self.flags.gpt2_files]
        return words

    def run(self, name: str, script: str, model: Path, recipe: str, *more: str, gpus: int = 0) -> dict:
        """One training run, export and proof included; its figures."""
        gpus = gpus or self.flags.gpus
        output, log = self.work / name, self.work / f"{name}.log"
        words = ["benchmarks/communication.py", *self.words(script, model, recipe, output, *more)]
        began = time.perf_counter()
        printed = finish(launch(words, gpus, log), log)
        report = json.loads((output / "run_report.json").read_text(encoding="utf-8"))
        shutil.rmtree(output)
        found = {
            "stage": name,
            "gpus": gpus,
            "command": shlex.join(["torchrun", f"--nproc_per_node={gpus}", *words[1:]]),
        }
        return self.note(found | figures(report, printed) | {"whole_s": time.perf_counter() - began})

    def note(self, found: dict) -> dict:
        """Keep a result."""
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        about = {"date": datetime.date.today().isoformat(), "device": device, "torch": torch.__version__}
        with open(self.flags.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(found | about) + "\n")
        return found

    # ---- stages

    def llama_fsdp(self) -> list[dict]:
        return [self.run("llama_fsdp", "llama_training.py", self.model("6.7B"), LLAMA, *shlex.split(FSDP))]

    def xgen_fsdp(self) -> list[dict]:
        model = self.model("6.7B", vocab_size=51200, bos_token_id=50256, eos_token_id=50256)
        for file in model.glob("*token*"):  # XGen's is built by the script
            file.unlink()
        return [self.run("xgen_fsdp", "xgen_training.py", model, XGEN, *shlex.split(FSDP))]

    def zero2(self) -> list[dict]:
        return [self.zero("zero2", 2)]

    def zero3(self) -> list[dict]:
        return [self.zero("zero3", 3)]

    def zero(self, name: str, stage: int) -> dict:
        """ds_config.json, edited as a user does."""
        edited = self.work / f"{name}.json"
        text = (ROOT / "ds_config.json").read_text(encoding="utf-8")
        assert text.count('"stage": 2') == 1
        edited.write_text(text.replace('"stage": 2', f'"stage": {stage}'), encoding="utf-8")
        return self.run(name, "llama_training.py", self.model("6.7B"), LLAMA, "--deepspeed", str(edited))

    def padded(self) -> list[dict]:
        more = [*shlex.split(FSDP), "--packing", "False"]
        return [self.run("padded", "llama_training.py", self.model("6.7B"), LLAMA, *more)]

    def trl(self) -> list[dict]:
        """The same model, rows and tokens for each optimizer step."""
        log, output = self.work / "trl.log", self.work / "trl.json"
        words = ["benchmarks/trl_peer.py", str(self.model("6.7B")), str(self.rows), str(output), str(self.flags.steps)]
        finish(launch(words, self.flags.gpus, log), log)
        found = json.loads(output.read_text(encoding="utf-8"))
        return [self.note({"stage": "trl", "gpus": self.flags.gpus} | found)]

    def scaling(self) -> list[dict]:
        found = []
        gpus = 1
        while gpus <= self.flags.gpus:
            recipe = "--per_device_train_batch_size 16 --gradient_accumulation_steps 8 --learning_rate 2e-5"
            more = shlex.split(FSDP) if gpus > 1 else []
            found.append(self.run(f"scaling_{gpus}", "llama_training.py", self.model("1.1B"), recipe, *more, gpus=gpus))
            found[-1]["share_of_one_gpu"] = found[-1]["tokens_per_s_per_gpu"] / found[0]["tokens_per_s_per_gpu"]
            gpus *= 2
        return found

    def restart(self) -> list[dict]:
        model, every = self.model("1.1B"), max(2, self.flags.steps // 5)
        saving = ["--save_strategy", "steps", "--save_steps", str(every), "--save_total_limit", "1", *shlex.split(FSDP)]
        alone = self.run("restart_alone", "llama_training.py", model, LLAMA, *saving)
        output, log = self.work / "restart", self.work / "restart.log"
        words = self.words("llama_training.py", model, LLAMA, output, *saving, "--resume_from_checkpoint", "True")
        process = launch(words, self.flags.gpus, log, "--max_restarts=3")
        while not re.search(rf"^step +{2 * every + 1}/", log.read_text(encoding="utf-8"), re.M):
            if process.poll() is not None:
                finish(process, log)
                raise AssertionError("the run ended before a rank could be killed")
            time.sleep(0.05)
        workers = [p for p in psutil.Process(process.pid).children() if "llama_training.py" in " ".join(p.cmdline())]
        assert len(workers) == self.flags.gpus, workers
        killed_at, before = time.perf_counter(), len(log.read_text(encoding="utf-8"))
        workers[-1].send_signal(signal.SIGKILL)
        while process.poll() is None and not re.search(
            r"^step ", log.read_text(encoding="utf-8")[before + 400 :], re.M
        ):
            time.sleep(0.05)
        resumed_s = time.perf_counter() - killed_at
        finish(process, log)
        report = json.loads((output / "run_report.json").read_text(encoding="utf-8"))
        shutil.rmtree(output)
        pairs = list(zip(losses_of(report), alone["losses"], strict=True))
        found = {"stage": "restart", "gpus": self.flags.gpus, "killed_after_step": 2 * every + 1}
        found |= {"largest_loss_difference": max(abs(a - b) for a, b in pairs), "seconds_until_next_step": resumed_s}
        return [self.note(found)]


STAGES = ("llama_fsdp", "xgen_fsdp", "zero2", "zero3", "padded", "trl", "scaling", "restart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="models and outputs: up to 60 GB")
    parser.add_argument("--results", type=Path, required=True, help="file that the JSON lines are added to")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--data_path", type=Path, help="a CSV with prompt and response")
    parser.add_argument("--gpt2_files", help="for xgen_fsdp on a machine without a network")
    parser.add_argument("--model", choices=MODELS, help="use this model: `tiny` tries the stages on a CPU")
    flags = parser.parse_args()
    for found in getattr(Bench(flags), flags.stage)():
        shown = {key: value for key, value in found.items() if key not in ("losses", "command", "proved", "seconds")}
        print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in shown.items()}), flush=True)


if __name__ == "__main__":
    main()
