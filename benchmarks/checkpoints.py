"""What one checkpoint of a sharded run takes, in bytes and in seconds, next to the same bytes written by dd.

    python benchmarks/checkpoints.py --model 6.7B --work_dir /tmp/checkpoints           # two GPUs; 108 GB free at a time
    python benchmarks/checkpoints.py --model 3.4B --layout FULL_STATE_DICT --work_dir /tmp/checkpoints     # as it was before
    python benchmarks/checkpoints.py --model tiny --work_dir /tmp/checkpoints           # on a CPU, over gloo

Stages, each by itself with --stages: `model` writes random weights and rows, `save` trains two steps of the original's command,
saves one checkpoint after the last and exports, `dd` has as many processes write as many zeros, synced. Each stage is timed and
ended after --timeout_s, and what a stage wrote is removed when the next one no longer needs it. The last lines are for a reader.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_ladder import MODELS, make_model, make_rows
from bench_multi_gpu import FSDP, LLAMA, REST

ROOT = Path(__file__).resolve().parent.parent


def timed(commands: list[list[str]], log: Path, timeout_s: float) -> float:
    """Run commands at the same time; the seconds until all have ended. SystemExit when one fails or takes too long."""
    began = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        running = [
            subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
            for command in commands
        ]
    try:
        codes = [process.wait(max(0.1, began + timeout_s - time.perf_counter())) for process in running]
    except subprocess.TimeoutExpired:
        codes = [-signal.SIGKILL]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its workers
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
    if any(codes):
        sys.exit(f"{log.read_text('utf-8')[-3000:]}\n{log}: exit codes {codes}")
    return time.perf_counter() - began


def save(args: argparse.Namespace, model: Path, rows: Path, output: Path) -> dict:
    """Bytes of the checkpoint, and the seconds of the run's phases."""
    shutil.rmtree(output, ignore_errors=True)
    gpus = torch.cuda.is_available()
    script = ROOT / ("llama_training.py" if gpus else "tests/support/fsdp_over_gloo.py")
    recipe = f"{LLAMA} {REST}".replace(
        "--save_strategy no", "--save_strategy steps --save_steps 2 --max_steps 2"
    ).split()
    words = [str(script), "--model_name_or_path", str(model), "--data_path", str(rows), "--output_dir", str(output)]
    words += [*recipe, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    words += [*FSDP.replace('"', "").replace("full_shard auto_wrap", "full_shard").split()]
    words += ["--fsdp_config", json.dumps({"state_dict_type": args.layout})] + ["--use_cpu", "True"] * (not gpus)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    whole_s = timed([[*launcher, f"--nproc_per_node={args.ranks}", *words]], output.with_suffix(".log"), args.timeout_s)
    record = json.loads((output / "run_report.json").read_text("utf-8"))
    manifest = json.loads((output / "checkpoint-2" / "manifest.json").read_text("utf-8"))
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    largest = dict(sorted(sizes.items(), key=lambda file: -file[1])[:6])
    shutil.rmtree(output)
    return {"bytes": sum(sizes.values()), "whole_s": whole_s, "durations_s": record["durations_s"], "largest": largest}


def dd(args: argparse.Namespace, size: int) -> float:
    """Seconds in which as many processes as there are ranks write `size` bytes to the same disk, synced."""
    files = [args.work_dir / f"zeros-{rank}" for rank in range(args.ranks)]
    blocks = max(1, round(size / args.ranks / 2**24))
    commands = [["dd", "if=/dev/zero", f"of={file}", "bs=16M", f"count={blocks}", "conv=fsync"] for file in files]
    try:
        return timed(commands, args.work_dir / "dd.log", args.timeout_s)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="6.7B", choices=list(MODELS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layout", default="SHARDED_STATE_DICT", choices=("SHARDED_STATE_DICT", "FULL_STATE_DICT"))
    parser.add_argument("--stages", nargs="+", default=["model", "save", "dd"], choices=("model", "save", "dd"))
    parser.add_argument("--timeout_s", type=float, default=400, help="of one stage")
    parser.add_argument("--work_dir", type=Path, required=True)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    model, rows, kept = (args.work_dir / name for name in (args.model, "rows.csv", f"{args.model}-{args.layout}.json"))
    if "model" in args.stages and not model.exists():
        make_model(model, MODELS[args.model])
    if not rows.exists():
        make_rows(rows, 2_000)
    if "save" in args.stages:
        kept.write_text(json.dumps(save(args, model, rows, args.work_dir / f"out-{args.layout}")), "utf-8")
    found = json.loads(kept.read_text("utf-8"))
    print(f"{args.model}, {args.ranks} ranks, {args.layout}: a checkpoint of {found['bytes'] / 1e9:.3f} GB")
    print(f"  largest files: {', '.join(f'{name} {size / 1e9:.3f} GB' for name, size in found['largest'].items())}")
    print(f"  seconds by phase: {json.dumps(found['durations_s'])}; the whole command {found['whole_s']:.0f}")
    if "dd" in args.stages:
        seconds, took = dd(args, found["bytes"]), found["durations_s"]["checkpoints"]
        print(
            f"  checkpoint {took:.1f} s, {args.ranks} x dd of the same bytes {seconds:.1f} s: {took / seconds:.2f} times"
        )


if __name__ == "__main__":
    main()
