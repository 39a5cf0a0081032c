"""The job: ranks, printed lines, and errors that end every rank with one message."""

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch.distributed import PrefixStore, TCPStore

# peft 0.21 (and sft/plan/micro_batch_tokens.py, for transformers 5.17) read a name that transformers 5.23 is about to drop
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


class UserError(Exception):
    """A mistake that the user can mend: what is wrong, where, and what to do.

    The entry scripts end it in one message on stderr, no traceback, and exit code 2 from every rank.

    Args:
        problems: one message, or a list of them that were found together.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def rank() -> int:
    """This process's rank in the job, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its machine, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes in the job, as torchrun sets it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


INVISIBLE = "\n\t\u00a0\u2007\u202f\u3000\u200c\u200d"  # line feeds, tabs, spaces and joiners that texts need


def printable(text: str) -> str:
    """Spell out what could steer a terminal; whatever comes from data, a model or a path is printed through this."""
    return "".join(c if c.isprintable() or c in INVISIBLE else repr(c)[1:-1] for c in text)


def say(text: object, coloured: bool = False) -> None:
    """Print once for the job (rank 0), at once; `coloured` text brings escape sequences of its own."""
    if rank() == 0:
        print(text if coloured else printable(str(text)), file=sys.stdout, flush=True)


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


@contextmanager
def one_message_for_user_errors() -> Iterator[None]:
    """End a UserError in one message on stderr (the lowest failing rank's copy) and exit code 2 from every rank."""
    try:
        yield
    except UserError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to the ranks that end a moment after the first
        problems = _collect_errors_of_all_ranks(error.problems)
        if problems:
            head = problems if len(problems) == 1 else [f"{len(problems)} problems", *(f"  - {p}" for p in problems)]
            print(printable("error: " + "\n".join(head)), file=sys.stderr, flush=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        raise SystemExit(2) from None


def _collect_errors_of_all_ranks(problems: list[str], patience: timedelta = timedelta(seconds=20)) -> list[str]:
    """Wait for the other ranks' ends and return the problems that this rank should print (none, if another does).

    torchrun stops every process as soon as one has failed, so a rank that left first would cut off the others'
    exit codes, and with them the message of a rank that knows more. A rank that does not fail is not waited for
    longer than `patience`.
    """
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return problems if rank() == 0 or not problems else []
    agent = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
    # The agent's store outlives a restart of the workers: each attempt meets under its own name.
    store = PrefixStore(f"user_error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", agent)
    everyone = [str(index) for index in range(world_size())]
    store.set(str(rank()), json.dumps(problems))
    try:
        store.wait(everyone, patience)
    except torch.distributed.DistStoreError:
        everyone = [name for name in everyone if store.check([name])]
    if str(rank()) != everyone[0]:
        found: list[str] = []
    else:
        found = list(dict.fromkeys(problem for name in everyone for problem in json.loads(store.get(name))))
    # The store may live in this machine's agent: no rank leaves before all have read.
    store.set(f"read/{rank()}", "")
    with suppress(torch.distributed.DistStoreError):  # a rank that was killed meanwhile reads nothing
        store.wait([f"read/{name}" for name in everyone], patience)
    return found


@contextmanager
def all_ranks_or_none() -> Iterator[None]:
    """Raise on every rank the UserErrors that any rank met inside.

    A file that is missing on one machine of several must not leave the other machines waiting in a collective. The
    wait here has no NCCL in it and lasts as long as the slowest rank's work.
    """
    group = None
    if torch.distributed.is_initialized() and world_size() > 1:
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    problems: list[str] = []
    try:
        yield
    except UserError as error:
        problems = error.problems
    if group is not None:
        every: list[list[str]] = [[]] * world_size()
        torch.distributed.all_gather_object(every, problems, group=group)
        problems = list(dict.fromkeys(problem for found in every for problem in found))
    if problems:
        raise UserError(problems)


def sync(*paths: str | os.PathLike) -> None:
    """Flush files, or folders' lists of names, to the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_kept: list[TCPStore] = []  # the process group talks through it until the process ends


@contextmanager
def new_store_for_each_attempt(patience_s: float = 600) -> Iterator[None]:
    """Around a run: MASTER_PORT is that of this attempt's store. It does nothing without --max_restarts."""
    agent_port = os.environ.get("MASTER_PORT", "")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts == 0 or world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield
        return
    address = os.environ["MASTER_ADDR"]
    agent = PrefixStore("attempt", TCPStore(address, int(agent_port), is_master=False))
    if rank() == 0:
        store = TCPStore(address, 0, world_size(), is_master=True, wait_for_workers=False)
        agent.set("port", str(store.port))
    else:
        store = _current_store(address, agent, time.monotonic() + patience_s)
    _kept.append(store)
    os.environ["MASTER_PORT"] = str(store.port)
    try:
        yield
    finally:
        os.environ["MASTER_PORT"] = agent_port


def _current_store(address: str, agent: PrefixStore, until: float) -> TCPStore:
    """Connect to the store of this attempt's rank 0: the one of an earlier attempt has died with its process."""
    while True:
        try:
            port = int(agent.get("port"))
            return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2))
        except torch.distributed.DistError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
