"""How soon all processes of a run leave after a fault on one of them, for each launcher and each fault.

    python benchmarks/bench_ends.py                                  # all; about six minutes on two idle cores
    python benchmarks/bench_ends.py --launchers torchrun --faults killed

Two ranks on the CPU, started with a fault on rank 1. Two times are measured, both until the last process, launchers included, is gone:

    from the fault   since rank 1 refused its file or was killed; the promise of docs/several_machines.md is 10 s
    from the start   since Enter: launcher, imports and the run so far are in it

    missing file   rank 1's --data_path is not there
    no checkpoint  rank 1 alone refuses the folder of --resume_from_checkpoint, while rank 0 is in the next collective
    killed         rank 1 gets SIGKILL in a step while rank 0 waits for it in a collective
    killed early   the same before a process group exists

Prints a table, and a line of JSON for each run with --output.
"""

import argparse
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision=no"]
LAUNCHERS: dict[str, list[list[str]]] = {  # the commands that start the ranks
    "by hand": [[sys.executable]] * 2,
    "two hosts": [[sys.executable]] * 2,  # by hand, and each rank names another host
    "torchrun": [[*TORCHRUN, "--nproc_per_node=2", "--rdzv_endpoint=127.0.0.1:0"]],
    "two agents": [[*TORCHRUN, "--nproc_per_node=1", "--nnodes=2", "--rdzv_id=1", "--rdzv_endpoint=127.0.0.1:PORT"]]
    * 2,
    "accelerate": [
        [*ACCELERATE, "--dynamo_backend=no", "--num_processes=2", "--num_machines=1", "--main_process_port=PORT"]
    ],
    "deepspeed": [[sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port=PORT"]],
}
FAULTS = ("missing file", "no checkpoint", "killed", "killed early")
TIMEOUT_S = 120


# ---- in a rank


def break_rank_1(fault: str) -> None:
    """Bring the fault about, and print when: CLOCK_MONOTONIC is one clock for all processes of a machine."""
    print(f"process {os.getpid()}", flush=True)
    sys.path.insert(0, str(ROOT))
    import_module("sft")  # first, as in the script
    job: Any = import_module("sft.job")
    if "TWO_HOSTS" in os.environ:
        job.socket.gethostname = lambda: f"host{job.rank()}"
    if job.rank() != 1:
        return
    if fault == "missing file":
        sys.argv[sys.argv.index("--data_path") + 1] = "/no/such.csv"
        refused = job.UserError.__init__
        job.UserError.__init__ = lambda self, *problems: print_fault() or refused(self, *problems)
    elif fault == "no checkpoint":
        resume: Any = import_module("sft.saving.resume")
        resume.step_of = lambda folder: print_fault() or -1
    elif fault == "killed":
        trainer: Any = import_module("sft.run.trainer")
        trainer.SupervisedTrainer.training_step = kill_this_rank
    elif fault == "killed early":
        flags: Any = import_module("sft.flags")
        flags._read = kill_this_rank


def print_fault() -> Any:
    print(f"fault {time.monotonic()}", flush=True)


def kill_this_rank(*_) -> Any:
    print_fault()
    os.kill(os.getpid(), signal.SIGKILL)


# ---- outside


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def measure(launcher: str, fault: str, flags: list[str], folder: Path) -> dict[str, Any]:
    """Start the ranks, and wait until each is gone."""
    log, port = folder / f"{launcher}-{fault}.log".replace(" ", "-"), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "FAULT": fault}
    if launcher == "two hosts":
        environment["TWO_HOSTS"] = "1"
    ranks_by_hand = len(LAUNCHERS[launcher]) if LAUNCHERS[launcher][0] == [sys.executable] else 0
    began, started = time.monotonic(), []
    with open(log, "w") as file:
        for number, words in enumerate(LAUNCHERS[launcher]):
            mine = {
                "RANK": number,
                "LOCAL_RANK": number,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            more = {name: str(value) for name, value in mine.items()} if ranks_by_hand else {}
            command = [*(word.replace("PORT", port) for word in words), __file__, *flags]
            started.append(subprocess.Popen(command, env=environment | more, stdout=file, stderr=file))
    left: dict[int, float] = {}
    while len(left) < len(started) and time.monotonic() < began + TIMEOUT_S:
        for process in started:
            if process.pid not in left and process.poll() is not None:
                left[process.pid] = time.monotonic()
        time.sleep(0.02)
    for process in started:
        if process.poll() is None:
            process.kill()
    printed = log.read_text(errors="replace")
    ranks = [int(number) for number in re.findall(r"process (\d+)", printed)]
    while alive := [number for number in ranks if psutil.pid_exists(number)]:
        if time.monotonic() > began + TIMEOUT_S:
            for number in alive:
                os.kill(number, signal.SIGKILL)
        time.sleep(0.02)
    ended = time.monotonic()
    faults = re.findall(r"fault (\S+)", printed)
    return {
        "launcher": launcher,
        "fault": fault,
        "from_fault_s": round(ended - float(faults[0]), 1) if faults else None,
        "from_start_s": round(ended - began, 1),
        "exit_codes": [process.returncode for process in started],
        "errors": re.findall(r"^error: .*", printed, re.M),
        "tracebacks": printed.count("Traceback (most recent call last)"),
        "cpp_frames": len(re.findall(r"^(?:#|frame #)\d+", printed, re.M)),
        "load": round(os.getloadavg()[0], 1),
    }


def prepare(folder: Path) -> list[str]:
    """A tiny model, a folder that rank 0 takes for a checkpoint, and the flags of a run."""
    model = folder / "model"
    made = [sys.executable, str(ROOT / "examples" / "make_tiny_llama.py"), "--output_dir", str(model)]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    (folder / "stopped" / "checkpoint-3").mkdir(parents=True)
    data = ROOT / "examples" / "facts.csv"
    flags = ["--model_name_or_path", str(model), "--data_path", str(data), "--data_cache_dir", str(folder / "cache")]
    return [*flags, "--use_cpu", "True", "--prompt_template", "alpaca", "--max_steps", "50", "--save_strategy", "no"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--output", type=Path, help="a .jsonl file")
    parser.add_argument("--logs", type=Path, help="a folder that keeps what the runs printed")
    given = parser.parse_args()
    print(
        "| launcher | fault | s from the fault | s from the start | errors | tracebacks | C++ frames | exit codes | load |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = prepare(folder)
        (given.logs or folder).mkdir(parents=True, exist_ok=True)
        for launcher in given.launchers:
            for fault in given.faults:
                more = ["--output_dir", str(folder / ("stopped" if fault == "no checkpoint" else "out"))]
                more += ["--resume_from_checkpoint", str(folder / "stopped/checkpoint-3")] * (fault == "no checkpoint")
                more += ["--overwrite_output_dir", "True"] * (fault != "no checkpoint")
                found = measure(launcher, fault, [*flags, *more], given.logs or folder)
                shown = dict(found, errors=len(found["errors"]))
                names = "launcher fault from_fault_s from_start_s errors tracebacks cpp_frames exit_codes load".split()
                print(f"| {' | '.join(str(shown[name]) for name in names)} |", flush=True)
                if given.output:
                    with open(given.output, "a") as file:
                        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    if "FAULT" in os.environ:
        break_rank_1(os.environ["FAULT"])
        sys.argv[0] = str(ROOT / "llama_training.py")
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main()
