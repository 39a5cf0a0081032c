"""Hold the ranks of a job together: printed lines, and errors that end every rank with one message."""

import atexit
import io
import json
import multiprocessing
import os
import select
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

import torch

from sft import launchers
from sft.launchers import open_store, print_wait, rank, world_size
from sft.outside import UserError, printable

# peft 0.21 (and sft/plan/micro_batch_tokens.py, for transformers 5.17) read a name that transformers 5.23 is about to drop
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


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
            what = f"rank {rank()} on {_meeting.host} ended with {type(error).__name__}: {error} (traceback in its own output)."
            _meeting.leave([ENDED if isinstance(error, torch.distributed.DistNetworkError) else what])
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
        atexit.register(_leave_nothing)


def _leave_nothing() -> None:
    """While the interpreter ends: nothing is left to interrupt, and it would wait for ever for a loader's workers, which ignore signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if workers := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's tells of each worker that is killed
        for worker in workers:
            worker.kill()


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


def gather(value: Any) -> list:
    """The value of every rank, in rank order; `[value]` without torch.distributed."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def sync(*paths: str | os.PathLike) -> None:
    """Flush files, or folders' lists of names, to the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


ENDED = "rank 0, or torchrun's agent, has ended while others waited for it: see its own output."


class Meeting:
    """Where the ranks of a job tell each other what they refuse: a store of keys, served by rank 0 or torchrun's agent.

    A thread of each rank watches for another that leaves or was killed, and ends the process when the rank itself does not notice:
    it may wait for the other in a collective. Who was killed is seen by its connection to rank 0, on which nothing is sent: the
    kernel closes it with the process, and keepalive breaks it when the machine is gone.
    """

    POLL_S, GRACE_S, PATIENCE_S = 0.3, 3.0, 8.0  # patience: with ranks that have not started, or hang

    def __init__(self) -> None:
        self.host, self.rounds = socket.gethostname(), 0
        self.leaving, self.only_one_thread = threading.Event(), threading.Lock()
        self.told, self.killed = 0, set[int]()
        self.store = open_store()
        self.store.set(f"host/{rank()}", self.host)
        self.listener: socket.socket | None = None
        self.connections: dict[socket.socket, int | None] = {}  # to which rank; rank 0 has one to each
        self.reached_rank_0 = False
        if rank() == 0:
            self.listener = socket.create_server(("", 0), backlog=world_size())
            self.store.set("port", str(self.listener.getsockname()[1]))
        until = time.monotonic() + 1  # who is killed before it is connected is not seen
        while rank() != 0 and not self._reach_rank_0() and time.monotonic() < until:
            time.sleep(0.02)
        os.register_at_fork(after_in_child=self._let_go)  # a worker of a killed rank would keep it open
        threading.Thread(target=self._watch, daemon=True).start()

    def exchange(self, problems: list[str]) -> list[str]:
        """Wait until every rank is here, printing for whom after a while, and return the problems of all."""
        self.rounds += 1
        began, patience_s = time.monotonic(), launchers.SAYS_AFTER_S * (1 if self.rounds == 1 else 6)
        missing = self._meet(str(self.rounds), problems, patience_s)
        while missing:
            if rank() == min(set(range(world_size())) - set(missing)):
                names = [f"{index} on {self._host(index) or '? (not started yet)'}" for index in missing[:8]]
                print_wait(f"{len(missing)} of {world_size()} ranks: rank {', '.join(names)}", began)
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
            problems = self._find_killed() or problems
            missing = self._meet("leaving", problems, self.PATIENCE_S)
            found = self._read("leaving", [index for index in range(world_size()) if index not in missing])
            if rank() == next(index for index in found if self._host(index) == self.host):
                _print_problems(self._find_killed() or _united(found.values()))
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
            if rank() == 0:
                self._meet("left", [], self.PATIENCE_S)
            else:  # and no word more: rank 0 goes when it has this one
                self.store.set(f"left/{rank()}", "null")

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
                self._find_killed()
        return [index for index in range(world_size()) if not self.store.check([f"{name}/{index}"])]

    def _read(self, name: str, ranks: Iterable[int]) -> dict[int, list[str]]:
        found = {index: json.loads(self.store.get(f"{name}/{index}")) for index in ranks}
        return {index: problems for index, problems in found.items() if problems is not None}

    def _host(self, index: int) -> str:
        return self.store.get(f"host/{index}").decode() if self.store.check([f"host/{index}"]) else ""

    def _find_killed(self) -> list[str]:
        """Look for ranks that have ended and did not leave; a sentence for each found so far."""
        for index in self._disconnected():
            if not self.store.check([f"left/{index}"]):
                self.killed.add(index)
        if self.killed and rank() == 0:
            self.store.set("killed", json.dumps(list(self.killed)))
        elif self.store.check(["killed"]):
            self.killed.update(json.loads(self.store.get("killed")))
        return [
            f"rank {index} on {self._host(index)} has ended without a word: it was killed, for example because the host's memory was full."
            for index in sorted(self.killed)
        ]

    def _reach_rank_0(self) -> bool:
        """Connect to it once, when it is here."""
        if not self.reached_rank_0 and self.store.check(["port"]):
            self.reached_rank_0 = True
            where = os.environ["MASTER_ADDR"], int(self.store.get("port"))
            try:
                connection = socket.create_connection(where, timeout=self.PATIENCE_S)
                connection.sendall(rank().to_bytes(4, "big"))
                self.connections[_kept_alive(connection)] = 0
            except OSError as error:
                what = f"rank {rank()} cannot connect to rank 0 at {where[0]}:{where[1]} ({error})"
                complain(f"warning: {what}: if one of them is killed, the other may go on waiting for it.")
        return self.reached_rank_0

    def _disconnected(self) -> list[int]:
        """The ranks whose connection has broken since the last call."""
        if rank() != 0:
            self._reach_rank_0()
        broken = []
        for readable in select.select([*filter(None, [self.listener]), *self.connections], [], [], 0)[0]:
            if readable is self.listener:
                self.connections[_kept_alive(self.listener.accept()[0])] = None
                continue
            try:
                received = readable.recv(4)
            except OSError:
                received = b""
            if received:
                self.connections[readable] = int.from_bytes(received, "big")
            elif (index := self.connections.pop(readable)) is not None:
                broken.append(index)
        return broken

    def _let_go(self) -> None:
        for mine in (self.listener, *self.connections):
            if mine:
                mine.close()

    def _watch(self) -> None:
        while True:
            try:
                problems = self._find_killed()
                one_leaves = bool(problems) or self.store.check(["one leaves"])
            except torch.distributed.DistError:
                problems, one_leaves = [ENDED], True
            if one_leaves and not self.leaving.wait(self.GRACE_S):
                self.leave(problems)
                self.close()
                os._exit(2)
            if self.leaving.wait(self.POLL_S):
                return


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4)):  # seconds, seconds, times
        if hasattr(socket, option):  # not on every macOS
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


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
