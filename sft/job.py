"""Hold the ranks of a job together: printed lines, and errors that end every rank with one message."""

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.distributed import PrefixStore, Store, TCPStore

from sft.outside import UserError, printable

# peft 0.21 (and sft/plan/micro_batch_tokens.py, for transformers 5.17) read a name that transformers 5.23 is about to drop
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
# bitsandbytes (0.50), which peft imports where it is installed, warns of a kernel for 4-bit weights on a CPU
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda line: "gemm_4bit_forward" not in line.getMessage())


def rank() -> int:
    """This process's rank in the job, as its launcher sets it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its machine, as its launcher sets it; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes in the job, as the launcher sets it; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(text: object, coloured: bool = False) -> None:
    """Print once for the job (rank 0), at once; `coloured` text brings escape sequences of its own."""
    if rank() == 0:
        print(text if coloured else printable(str(text)), file=sys.stdout, flush=True)


def commit() -> str:
    """The commit of this code, 12 digits; "not a git checkout" where there is none, or no git."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    with suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "not a git checkout"
    return "not a git checkout"


def complain(text: str) -> None:
    """Print on stderr, from whichever rank calls."""
    print(printable(text), file=sys.stderr, flush=True)


class Choice(NamedTuple):
    """What was chosen for the user, and why, as a run prints it.

    str(Choice("compiled layers", False, "--compile_layers")) -> "compiled layers: off (--compile_layers)"
    """

    what: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = ("on" if self.value else "off") if isinstance(self.value, bool) else self.value
        return f"{self.what}: {value} ({self.reason})"


@contextmanager
def swapped(target: Any, **values: Any) -> Iterator[None]:
    """Give attributes of an object other values for a while."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


_add_when_interrupted: Callable[[], str] = str


def when_interrupted(add: Callable[[], str]) -> None:
    """What is added to the line that Ctrl-C ends in, from now on."""
    global _add_when_interrupted
    _add_when_interrupted = add


@contextmanager
def one_message_for_user_errors() -> Iterator[None]:
    """End a UserError in one message on stderr and exit code 2 from every rank, however the ranks were started; Ctrl-C in a line, and 130."""
    for stream in (sys.stdout, sys.stderr):  # in a locale of ASCII or Latin-1 a Chinese row must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ:  # torchrun and accelerate launch; deepspeed
        threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    try:
        yield
    except UserError as error:
        _end(error.problems)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes it on once more
        _end([f"interrupted{_add_when_interrupted() or '.'}"])
        raise SystemExit(130) from None
    except Exception as error:
        if _meeting is not None:  # the other ranks would wait for this one
            what = f"{type(error).__name__}: {error}"
            _meeting.leave([f"rank {rank()} on {_meeting.host} ended with {what} (traceback in its own output)."])
            if _meeting.killed and isinstance(error, RuntimeError):  # gloo's or NCCL's, of a connection that is no more
                raise SystemExit(2) from None
        raise
    except SystemExit as error:
        if _meeting is not None and error.code:  # it has printed why
            _meeting.leave([])
        raise
    finally:
        if _meeting is not None:
            _meeting.close()


def _end(problems: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, to the ranks that end a moment after the first
    if _meeting is None:
        _print_problems(problems)
    else:
        _meeting.leave(problems)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _print_problems(problems: list[str]) -> None:
    head = problems if len(problems) == 1 else [f"{len(problems)} problems", *(f"  - {p}" for p in problems)]
    if problems:
        complain("error: " + "\n".join(head))


@contextmanager
def all_ranks_or_none() -> Iterator[None]:
    """Raise on every rank the UserErrors that any rank met inside.

    A file that is missing on one machine of several must not leave the other machines waiting in a collective. It needs
    no process group, and waits as long as the slowest rank works.
    """
    global _meeting
    problems: list[str] = []
    if world_size() > 1 and "RANK" in os.environ and _meeting is None:
        _meeting = Meeting()
    try:
        yield
    except UserError as error:
        problems = error.problems
    if _meeting is not None:
        try:
            problems = _meeting.exchange(problems)
        except torch.distributed.DistError:
            problems.append(ENDED)
    if problems:
        raise UserError(problems)


def differences_from_rank_0(values: dict[str, str]) -> list[str]:
    """What differs between this rank and rank 0, a sentence each. All ranks together; they would wait for each other later."""
    theirs = _meeting.of_rank_0(values) if _meeting else values
    return [
        f"{name} is {theirs.get(name)} on rank 0 and {values.get(name)} on another rank. Give all of them the same."
        for name in sorted(theirs.keys() | values.keys())
        if theirs.get(name) != values.get(name)
    ]


def sync(*paths: str | os.PathLike) -> None:
    """Flush files, or folders' lists of names, to the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


ENDED = "rank 0, or torchrun's agent, has ended while others waited for it: see its own output."
SAYS_AFTER_S = 5.0  # of waiting for other ranks; later, six times that, because ranks have different work


class Meeting:
    """Where the ranks of a job tell each other what they refuse: a store of keys, served by rank 0 or torchrun's agent.

    A thread of each rank watches for another that leaves or was killed, and ends the process when the rank itself does not notice:
    it may wait for the other in a collective.
    """

    POLL_S, GRACE_S, PATIENCE_S = 0.3, 3.0, 8.0  # patience: with ranks that have not started, or hang

    def __init__(self) -> None:
        self.host, self.rounds = socket.gethostname(), 0
        self.leaving, self.only_one_thread = threading.Event(), threading.Lock()
        self.told, self.killed = 0, set[int]()
        self.processes: dict[int, int | None] = {}  # of the ranks; None on another machine
        self.store = _open_store()
        self.store.set(f"host/{rank()}", self.host)
        self.store.set(f"process/{rank()}", json.dumps([_processes_here(), os.getpid()]))
        threading.Thread(target=self._watch, daemon=True).start()

    def exchange(self, problems: list[str]) -> list[str]:
        """Wait until every rank is here, printing for whom after a while, and return the problems of all."""
        self.rounds += 1
        began, patience_s = time.monotonic(), SAYS_AFTER_S * (1 if self.rounds == 1 else 6)
        missing = self._meet(str(self.rounds), problems, patience_s)
        while missing:
            if rank() == min(set(range(world_size())) - set(missing)):
                names = [f"{index} on {self._host(index) or '? (not started yet)'}" for index in missing[:8]]
                _print_wait(f"{len(missing)} of {world_size()} ranks: rank {', '.join(names)}", began)
            patience_s *= 2
            missing = self._wait_for(str(self.rounds), patience_s)
        return _united(self._read(str(self.rounds), range(world_size())).values())

    def of_rank_0(self, value: Any) -> Any:
        self.told += 1
        if rank() == 0:
            self.store.set(f"told/{self.told}", json.dumps(value))
        return json.loads(self.store.get(f"told/{self.told}"))

    def leave(self, problems: list[str]) -> None:
        """Tell every rank that this one leaves; when all do, print their problems, once on each machine."""
        self.leaving.set()
        self.only_one_thread.acquire()
        try:
            self.store.set("one leaves", "")
            problems = self._find_killed(range(world_size())) or problems
            missing = self._meet("leaving", problems, self.PATIENCE_S)
            found = self._read("leaving", [index for index in range(world_size()) if index not in missing])
            if rank() == next(index for index in found if self._host(index) == self.host):
                _print_problems(self._find_killed([]) or _united(found.values()))
            # a launcher kills the others when the first has failed
            self._meet("printed", [], 1 if missing else self.PATIENCE_S)
        except torch.distributed.DistError:  # whoever served the store has been killed
            self.killed.add(0)
            _print_problems(list(dict.fromkeys([ENDED, *problems])))

    def close(self) -> None:
        """Leave, rank 0 as the last because it may serve the store."""
        self.leaving.set()
        with suppress(torch.distributed.DistError):
            for name in ("leaving", "printed"):  # for a rank that leaves later; this one has nothing to say
                if not self.store.check([f"{name}/{rank()}"]):
                    self.store.set(f"{name}/{rank()}", "null")
            self._meet("left", [], self.PATIENCE_S if rank() == 0 else 0)

    def _meet(self, name: str, problems: list[str], seconds: float) -> list[int]:
        self.store.set(f"{name}/{rank()}", json.dumps(problems))
        return self._wait_for(name, seconds)

    def _wait_for(self, name: str, seconds: float) -> list[int]:
        """The ranks that have not set their key after these seconds."""
        until = time.monotonic() + seconds
        # `wait` with a timeout would print C++ warnings (torch 2.13)
        while not self.store.check([f"{name}/{index}" for index in range(world_size()) if index not in self.killed]):
            if time.monotonic() > until:
                break
            time.sleep(0.05)
            if self.leaving.is_set():  # a connection breaks a moment before its process is gone
                self._find_killed(range(world_size()))
        return [index for index in range(world_size()) if not self.store.check([f"{name}/{index}"])]

    def _read(self, name: str, ranks: Iterable[int]) -> dict[int, list[str]]:
        found = {index: json.loads(self.store.get(f"{name}/{index}")) for index in ranks}
        return {index: problems for index, problems in found.items() if problems is not None}

    def _host(self, index: int) -> str:
        return self.store.get(f"host/{index}").decode() if self.store.check([f"host/{index}"]) else ""

    def _find_killed(self, among: Iterable[int]) -> list[str]:
        """Look for ranks on this machine whose process is gone and that did not leave; a sentence for each found so far."""
        for index in among:
            if index not in self.processes and self.store.check([f"process/{index}"]):
                where, process = json.loads(self.store.get(f"process/{index}"))
                self.processes[index] = process if where == _processes_here() else None
            process = self.processes.get(index)
            if process and not _runs(process) and not self.store.check([f"left/{index}"]):
                self.killed.add(index)
        return [
            f"rank {index} on {self.host} has ended without a word: it was killed, for example because the host's memory was full."
            for index in sorted(self.killed)
        ]

    def _watch(self) -> None:
        turn = 0
        while not self.leaving.wait(self.POLL_S):
            turn = (turn + 1) % world_size()
            try:
                problems = self._find_killed([turn])
                one_leaves = bool(problems) or self.store.check(["one leaves"])
            except torch.distributed.DistError:
                problems, one_leaves = [ENDED], True
            if one_leaves and not self.leaving.wait(self.GRACE_S):
                self.leave(problems)
                self.close()
                os._exit(2)


def _processes_here() -> list[str]:
    """What names the processes that this one sees: containers of one machine can share its name and not its processes."""
    link = "/proc/self/ns/pid"
    return [socket.gethostname(), os.readlink(link) if os.path.exists(link) else ""]


def _runs(process: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def _end_with_the_launcher() -> None:
    """End this process when the one that started it has ended: nobody would end it, or start it again with the others."""
    launcher = os.getppid()
    while os.getppid() == launcher:
        time.sleep(0.5)
    print(f"error: the launcher of rank {rank()} has ended, and so does this rank.", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # in training: finish the step and save
    signal.alarm(8)  # ends the process when nothing below does
    time.sleep(4)
    if _meeting is not None:
        _meeting.leave([])
    os._exit(2)


_meeting: Meeting | None = None


def _united(found: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(problem for problems in found for problem in problems))


def _open_store() -> Store:
    """Connect to torchrun's store, or to rank 0's, which serves one at MASTER_PORT for the process group too.

    The store of torchrun's agent outlives a restart of the workers (--max_restarts). There, rank 0 of each attempt serves a
    new one, so that its ranks do not meet the keys of dead ones, and MASTER_PORT becomes that one's.
    """
    here = torch.accelerator.device_count() or world_size()
    os.environ.setdefault("LOCAL_RANK", str(rank() % here))  # not set by hand, and Accelerate needs it
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError("RANK and WORLD_SIZE are set. Set MASTER_ADDR and MASTER_PORT too, or use torchrun.") from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return PrefixStore("sft", _serve(address, port) if rank() == 0 else _connect(address, lambda: port))
    agent = TCPStore(address, port, is_master=False)
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return PrefixStore("sft", agent)
    if rank() == 0:
        store = _serve(address, 0)
        agent.set("sft/port", str(store.port))
    else:
        store = _connect(address, lambda: int(agent.get("sft/port")))  # an earlier attempt's, until rank 0 has set it
    os.environ["MASTER_PORT"] = str(store.port)
    return PrefixStore("sft", store)


def _serve(address: str, port: int) -> TCPStore:
    try:
        return TCPStore(address, port, is_master=True, wait_for_workers=False, multi_tenant=port != 0)
    except torch.distributed.DistError as error:
        raise UserError(f"MASTER_PORT {port}: rank 0 cannot serve there ({error}). Choose another port.") from error


def _connect(address: str, port: Callable[[], int]) -> TCPStore:
    """Connect to rank 0's store when it is there. A plain socket tries first: TCPStore prints C++ warnings (torch 2.13)."""
    began, patience_s = time.monotonic(), SAYS_AFTER_S
    while True:
        try:
            with socket.create_connection((address, port()), timeout=2):
                return TCPStore(address, port(), is_master=False, wait_for_workers=False)
        except (OSError, torch.distributed.DistError) as error:
            waited = time.monotonic() - began
            if waited > 1800:  # as long as PyTorch waits for a process group
                raise UserError(f"rank 0 does not answer at {address}:{port()}: {error}") from error
        if waited > patience_s and (local_rank() == 0 or rank() == 1):
            _print_wait(f"rank 0 at {address}:{port()}", began)
            patience_s *= 2
        time.sleep(0.2)


def _print_wait(whom: str, began: float) -> None:
    print(f"rank {rank()} has waited {time.monotonic() - began:.0f} s for {whom}", flush=True)
