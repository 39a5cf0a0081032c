"""Runs of the real training path that start in a fraction of a second, so that a test can afford to kill many of them.

A server process imports torch, transformers and `utils` once and forks each rank from there (multiprocessing's forkserver).
A rank is a process of its own, with torchrun's environment variables, that runs the real script and ends with its exit code.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
IMPORTED_ONCE = [
    "pytest",
    "jobs",
    "saved_runs",
    "utils",
    "four_bits_on_a_cpu",
    "sft.data.xgen_tokenizer",
    "torch.distributed.checkpoint",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "matplotlib.figure",
]


def _server():
    context = multiprocessing.get_context("forkserver")
    if forkserver._forkserver._forkserver_pid is None:
        before = dict(os.environ)
        paths = [str(ROOT), str(ROOT / "tests" / "support"), *sys.path]
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        context.set_forkserver_preload(IMPORTED_ONCE)
        forkserver.ensure_running()
        os.environ.clear()
        os.environ |= before
    return context


@functools.cache
def _compile_deepspeed() -> None:
    """Compile DeepSpeed's kernels where they are not in torch's cache: ranks would do it while a test waits for them."""
    process = _server().Process(target=_load_kernels)
    process.start()
    process.join()
    assert process.exitcode == 0


def _load_kernels() -> None:
    from deepspeed.accelerator import get_accelerator

    for name in ("CPUAdamBuilder", "ShareMemCommBuilder"):
        if builder := get_accelerator().create_op_builder(name):  # the second is for a machine without GPUs
            builder.load(verbose=False)


def _rank(script: str, flags: list[str], environment: dict[str, str], log: str, prepare) -> None:
    gc.freeze()  # the Trainer collects garbage once, in all that the server imported
    from saved_runs import draws_nothing

    from sft.report import record

    record.draw = draws_nothing
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    sys.argv = [script, *flags]
    sys.path.insert(0, str((ROOT / script).parent))
    if prepare is not None:
        prepare()
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Job:
    """The ranks of one run.

    Args:
        flags: the command line after the script's name.
        ranks: number of processes; 1 runs without torch.distributed, but with WORLD_SIZE="1", as under torchrun.
        log: file that all ranks write their output to.
        prepare: a function (importable) that each rank calls before it trains; it knows its rank from RANK.
        script: the project's script that each rank runs.
    """

    def __init__(
        self, flags: list[str], ranks: int, log: Path, prepare=None, script="llama_training.py", **environment: str
    ):
        self.log = log
        if "--deepspeed" in flags and find_spec("deepspeed"):
            _compile_deepspeed()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", **environment}
        shared["MASTER_PORT"] = str(port)
        self.ranks = []
        for rank in range(ranks):
            mine = (
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                if "WORLD_SIZE" in environment or ranks > 1
                else environment
            )
            process = _server().Process(target=_rank, args=(script, flags, mine, str(log), prepare))
            process.start()
            self.ranks.append(process)

    def wait(self, timeout_s: float = 300) -> list[int]:
        """Wait for all ranks and return their exit codes. When one has failed the others are killed, as torchrun does."""
        until = time.monotonic() + timeout_s
        while any(process.exitcode is None for process in self.ranks):
            if any(process.exitcode == -signal.SIGKILL for process in self.ranks):
                break
            if any(process.exitcode not in (None, 0) for process in self.ranks):
                time.sleep(1)  # the others' own ends
                break
            assert time.monotonic() < until, self.printed()
            time.sleep(0.02)
        self.kill()
        return [process.exitcode for process in self.ranks]

    def kill(self, which: list[int] | None = None) -> None:
        """SIGKILL the ranks (default all) that still run."""
        for index, process in enumerate(self.ranks):
            if (which is None or index in which) and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(process.pid, signal.SIGKILL)
        for index, process in enumerate(self.ranks):
            if which is None or index in which:
                process.join()

    def runs(self) -> bool:
        """Whether all ranks are alive."""
        return all(process.exitcode is None for process in self.ranks)

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def run(flags: list[str], ranks: int, log: Path, prepare=None, expect: int = 0, **more: str) -> str:
    """Run a job to its end, check every rank's exit code, and return what was printed."""
    job = Job(flags, ranks, log, prepare, **more)
    codes = job.wait()
    assert codes == [expect] * ranks, f"{codes}\n{job.printed()}"
    return job.printed()
