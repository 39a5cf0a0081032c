"""The memory plan next to CUDA's peak, for one GPU and for rank 0 of several.

    python benchmarks/plan_peaks.py --work_dir /tmp/peaks --results benchmarks/results/peaks.jsonl
    python benchmarks/plan_peaks.py --work_dir /tmp/peaks --results /tmp/peaks.jsonl --only fsdp --explain

Each run is the real command in a process of its own, for three optimizer steps. Its ranks are a group that PyTorch calls "fake": real kernels,
the real allocator and rank 0's own collective calls, which move nothing, so one GPU shows the memory of a rank among eight. Losses are not
those of a run, and nothing is timed. All rows have one length: every step is the fullest, which is what the plan is made for.

Each run adds a JSON line to --results; a table is printed last. --explain adds what held the memory at the peak, by the line of code
that asked for it. Exit code 1: a plan is below its peak by more than 2 % or above it by more than 5 %.
"""

import argparse
import collections
import datetime
import json
import os
import runpy
import shlex
import string
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RECIPE = (
    "--bf16 True --model_max_length 1024 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --per_device_eval_batch_size 2 "
    "--learning_rate 2e-5 --lr_scheduler_type cosine --logging_steps 1 --save_strategy no --save_rehearsal False"
)
FSDP, SEVERAL = '--fsdp "full_shard auto_wrap"', "--tokens_per_micro_batch 1024"
OFFLOAD = '--fsdp "full_shard auto_wrap offload"'
LAST = 3  # DDP lays its buckets out anew in the second step
RUNS = {  # name: ranks, flags
    "one GPU": (1, ""),
    "one GPU, several": (1, SEVERAL),
    "one GPU, padded": (1, "--packing False --model_max_length 200"),
    "one GPU, compiled": (1, "--compile_layers True"),
    "one GPU, recomputed": (1, "--gradient_checkpointing True"),
    "DDP": (2, ""),
    "DDP, several": (2, SEVERAL),
    "FSDP2": (2, f"{FSDP} --keep_gathered_weights False"),
    "FSDP2, gathered weights kept": (2, f"{FSDP} --keep_gathered_weights True"),
    "FSDP2, several": (2, f"{FSDP} {SEVERAL} --keep_gathered_weights False"),
    "FSDP2, recomputed": (2, f"{FSDP} --gradient_checkpointing True"),
    "FSDP2, offload": (2, OFFLOAD),
    "FSDP2, 4 ranks": (4, FSDP),
    "FSDP2, 8 ranks": (8, FSDP),
    "FSDP2, 8 ranks, compiled": (8, f"{FSDP} --compile_layers True"),
    "ZeRO-2, offload": (2, "--deepspeed zero2.json"),
    "ZeRO-2, offload, several": (2, f"--deepspeed zero2.json {SEVERAL}"),
    "ZeRO-2, offload, 8 ranks": (8, "--deepspeed zero2.json"),
    "ZeRO-2": (2, "--deepspeed zero2_gpu.json"),
    "ZeRO-3, offload": (2, "--deepspeed zero3.json"),
    "ZeRO-3, 8 ranks": (8, "--deepspeed zero3_gpu.json"),
}


class Alone:
    """In the place of `job.Meeting`: the other ranks do not exist."""

    host, killed = "here", False

    def exchange(self, problems: list[str]) -> list[str]:
        return problems

    def of_rank_0(self, value: Any) -> Any:
        return value

    def leave(self, problems: list[str]) -> None:
        print("error:", *problems, sep="\n", file=sys.stderr)

    def close(self) -> None:
        pass


class Watch(transformers.TrainerCallback):
    """Notes the plan and the peak after the last step, and ends the process."""

    def __init__(self, trainer: Any, plan: Any, result: str, explain: bool):
        self.trainer, self.plan, self.result, self.explain = trainer, plan, result, explain
        self.losses: list[float | None] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(wrapped := self.trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(None, summed_alone)  # DDP cannot read the fake group's answer (torch 2.13)
        # what loading took is no part of the plan, and the first step's update makes the optimizer's state
        if args.device.type == "cuda" and self.explain:
            torch.cuda.memory._record_memory_history(max_entries=2_000_000, stacks="python")
            self.base = torch.cuda.memory_allocated()

    def on_log(self, args, state, control, logs, **kwargs):
        self.losses.append(logs.get("loss"))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < LAST:
            return
        peak = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else 1
        found = {
            "plan_gib": self.plan.gpu_peak / 2**30,
            "peak_gib": peak / 2**30,
            "plan": self.plan.record()["gpu_gib"],
        }
        found |= {
            "tokens": self.plan.tokens,
            "several": self.plan.several,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
        if self.explain and args.device.type == "cuda":
            found["held_at_peak"] = held_at_peak(torch.cuda.memory._snapshot()["device_traces"][0], self.base)
        Path(self.result).write_text(json.dumps(found | {"losses": self.losses}))
        os._exit(0)


def summed_alone(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def held_at_peak(events: list[dict], base: int) -> dict[str, float]:
    """GiB that were held when most was, by the line of code that asked for them."""
    live: dict[int, tuple[int, int]] = {}  # address -> bytes, number of the event
    held, most, last = base, base, 0
    for number, event in enumerate(events):
        if event["action"] == "alloc":
            live[event["addr"]] = event["size"], number
            held += event["size"]
            if held > most:
                most, last = held, number
        elif event["action"] == "free_completed":
            held -= live.pop(event["addr"], (event["size"], 0))[0]
    live = {}
    for number, event in enumerate(events[: last + 1]):
        if event["action"] == "alloc":
            live[event["addr"]] = event["size"], number
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    totals: collections.Counter = collections.Counter()
    for size, number in live.values():
        totals[_where(events[number]["frames"])] += size
    found = {"before training": base / 2**30, "at the peak": most / 2**30}
    return found | {where: size / 2**30 for where, size in totals.most_common(14)}


def _where(frames: list[dict]) -> str:
    """The innermost frames that tell what a tensor is for."""
    told = [
        f"{Path(frame['filename']).parent.name}/{Path(frame['filename']).name}:{frame['line']} {frame['name']}"
        for frame in frames
        if not any(
            part in frame["filename"] for part in ("torch/nn/modules", "torch/_", "torch/utils", "torch/autograd", "<")
        )
    ]
    return " < ".join(told[:3]) or "backward (no Python frame)"


def child(result: str, ranks: int, explain: bool, words: list[str]) -> None:
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    if ranks > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    else:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    from sft import job
    from sft.run.prepare import Run

    job._meeting = Alone() if ranks > 1 else None  # type: ignore[assignment]
    build = Run.build_trainer

    def build_and_watch(run, model, head, settled, *rest):
        trainer = build(run, model, head, settled, *rest)
        # the fake group of torch 2.11 refuses its shape
        trainer.message.gather = lambda numbers: numbers.repeat(ranks, 1)
        trainer.add_callback(Watch(trainer, settled.memory_plan, result, explain))
        return trainer

    Run.build_trainer = build_and_watch  # type: ignore[method-assign]
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def write_rows(path: Path, examples: int, letters: int) -> None:
    half = letters // 2
    line = (string.ascii_lowercase * (half // 26 + 1))[:half]
    rows = [f"{index:06d}{line[6:]},{line[3:]}{line[:2]}" for index in range(examples)]  # BOS and EOS make it `letters`
    path.write_text("prompt,response\n" + "\n".join(rows) + "\n", encoding="utf-8")


def write_deepspeed(folder: Path) -> None:
    given = json.loads((ROOT / "ds_config.json").read_text(encoding="utf-8"))
    for stage in (2, 3):
        given["zero_optimization"]["stage"] = stage
        (folder / f"zero{stage}.json").write_text(json.dumps(given))
        there = {name: value for name, value in given["zero_optimization"].items() if not name.startswith("offload")}
        (folder / f"zero{stage}_gpu.json").write_text(json.dumps(given | {"zero_optimization": there}))


def one(name: str, gpu: int, flags: argparse.Namespace) -> dict[str, Any]:
    ranks, more = RUNS[name]
    work, safe = flags.work_dir, name.replace(", ", "_").replace(" ", "-")
    result, log = work / f"{safe}.json", work / f"{safe}.log"
    words = [
        "llama_training.py",
        "--model_name_or_path",
        str(work / flags.model),
        "--data_path",
        str(work / "rows.csv"),
    ]
    words += [
        "--output_dir",
        str(work / safe),
        *shlex.split(RECIPE),
        *shlex.split(more.replace("zero", f"{work}/zero")),
    ]
    words += shlex.split(flags.extra)
    command = [sys.executable, __file__, "child", str(result), str(ranks), str(int(flags.explain)), *words]
    result.unlink(missing_ok=True)
    began = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=flags.timeout_s,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    found: dict[str, Any] = {"run": name, "ranks": ranks, "flags": more, "seconds": time.perf_counter() - began}
    if not result.exists():
        return found | {"failed": f"exit code {code}: {log.read_text(encoding='utf-8')[-600:]}"}
    found |= json.loads(result.read_text())
    return found | {"plan_over_peak": found["plan_gib"] / found["peak_gib"] - 1}


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        return child(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1", sys.argv[5:])
    from bench_ladder import MODELS, make_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="models and logs")
    parser.add_argument("--results", type=Path, required=True, help="file that the JSON lines are added to")
    parser.add_argument("--model", choices=MODELS, default="1.1B")
    parser.add_argument("--letters", type=int, default=200, help="tokens of each row")
    parser.add_argument("--only", default="", help="runs whose name holds this text")
    parser.add_argument("--explain", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; those on one GPU share its memory")
    parser.add_argument("--gpus", type=int, default=1, help="runs take them in turn")
    parser.add_argument("--timeout_s", type=int, default=240)
    parser.add_argument("--extra", default="", help="more flags for each run")
    flags = parser.parse_args()
    flags.work_dir.mkdir(parents=True, exist_ok=True)
    flags.results.parent.mkdir(parents=True, exist_ok=True)
    if not (flags.work_dir / flags.model).exists():
        make_model(flags.work_dir / flags.model, MODELS[flags.model])
    write_rows(flags.work_dir / "rows.csv", 2048, flags.letters)
    write_deepspeed(flags.work_dir)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    about = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "model": flags.model,
    }
    names = [name for name in RUNS if flags.only.lower() in name.lower()]
    bad = 0
    with ThreadPoolExecutor(flags.jobs) as pool:
        results = list(pool.map(lambda job: one(job[1], job[0] % flags.gpus, flags), enumerate(names)))
    with open(flags.results, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(result | about) + "\n" for result in results)
    for result in results:
        if "failed" in result:
            bad += 1
            print(f"{result['run']:28}  {result['failed']}")
            continue
        for where, size in result.get("held_at_peak", {}).items():
            print(f"    {size:7.2f}  {where}")
        off = result["plan_over_peak"]
        bad += not -0.02 <= off <= 0.05
        print(
            f"{result['run']:28} {result['tokens']:6,} tokens  plan {result['plan_gib']:6.2f}  peak {result['peak_gib']:6.2f} GiB  {off:+.1%}"
        )
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
