"""Keep tokenized rows on disk: written once for each machine, memory-mapped by every rank.

An entry is a folder named by its key, a digest of everything that decides its content:

    tokens.bin           int32, the input_ids of all kept rows end to end
    lengths.npy          int32, tokens of each kept row; prompt_lengths.npy: how many of them come before the first trained one
    switches.npy         int64, places in tokens.bin where, later in a row, training stops and begins again; none of prompt and response
    outcomes.npy         uint8, what became of each row of the file: its place in OUTCOMES
    repeats.npy          uint8, for each kept row: 1 its prompt begins with BOS spelled out, 2 an answer ends with EOS, 3 both
    meta.json            the key's parts, the digest of each file, the largest id

Labels follow from tokens, prompt lengths and switches. An entry is built next to its place, under a file lock that the kernel
releases when its holder dies, and then renamed. Digests reveal what was damaged later.
"""

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from sft.job import UserError, say
from sft.outside import read_object

VERSION = 2  # raise it when the same parts of a key come to mean other tokens, or the files another form
# of a row: cut and shortened ones are kept too
OUTCOMES = ("kept", "cut", "empty", "no_room", "shortened", "disagreed")
KEPT, CUT, EMPTY, NO_ROOM, SHORTENED, DISAGREED = range(6)
QUIET_WAIT_S = 2.0  # ranks of one machine ask at the same moment; shorter waits are not printed
MOST_PROCESSES = 16  # one process reads and writes for about as many that tokenize
NO_SWITCHES = np.empty(0, np.int64)
NO_REPEATS = np.empty(0, np.uint8)


class Batch(NamedTuple):
    """Some rows of a file, tokenized; its arrays are those of `TokenizedRows`."""

    tokens: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    outcomes: np.ndarray
    switches: np.ndarray = NO_SWITCHES
    repeats: np.ndarray = NO_REPEATS


INDEX = Batch._fields[1:]  # each is a file of its own
# what opening an entry raises that is not there, or not whole
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError)


@dataclass
class TokenizedRows:
    """An entry, opened. `tokens` is memory-mapped and read-only; it is opened anew, not copied, in another process."""

    folder: str
    tokens: np.ndarray  # (all tokens,) int32
    lengths: np.ndarray  # (kept rows,) int32
    prompt_lengths: np.ndarray  # (kept rows,) int32
    outcomes: np.ndarray  # (rows of the file,) uint8
    largest_id: int
    # int64, where training stops and begins again, as places in `tokens`
    switches: np.ndarray = field(default_factory=lambda: NO_SWITCHES)
    repeats: np.ndarray = field(default_factory=lambda: NO_REPEATS)  # (kept rows,) uint8: BOS and EOS that cells spell
    first_row: int = 2  # the number of the file's first row
    offsets: np.ndarray = field(init=False)  # (kept rows,) int64, where each row starts in `tokens`
    trained: np.ndarray = field(init=False)  # (kept rows,) int64, trained tokens
    row_numbers: np.ndarray = field(init=False)  # (kept rows,) int64

    def __post_init__(self):
        self.offsets = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self.trained = self.lengths.astype(np.int64) - self.prompt_lengths
        stops, begins = self.switches[::2], self.switches[1::2]
        np.subtract.at(self.trained, np.searchsorted(self.offsets, stops, side="right") - 1, begins - stops)
        self.row_numbers = self.rows_with("kept", "cut", "shortened")

    def __reduce__(self):
        return _open, (Path(self.folder),)

    def key(self) -> dict[str, Any]:
        """The parts that decided the content."""
        return json.loads((Path(self.folder) / "meta.json").read_text())["key"]

    def rows_with(self, *outcomes: str) -> np.ndarray:
        """Numbers of the file's rows that met one of these of OUTCOMES."""
        return np.flatnonzero(np.isin(self.outcomes, list(map(OUTCOMES.index, outcomes)))) + self.first_row

    def prompt_digests(self) -> Iterator[int]:
        """A hash of each kept row's prompt; it differs between processes."""
        for start, length in zip(self.offsets.tolist(), self.prompt_lengths.tolist()):
            yield hash(self.tokens[start : start + length].tobytes())

    def counts(self) -> dict[str, int]:
        """How many rows were read and kept, and what became of the others."""
        found = np.bincount(self.outcomes, minlength=len(OUTCOMES)).tolist()
        rows = {f"rows_{outcome}": found[place] for place, outcome in enumerate(OUTCOMES) if outcome != "kept"}
        return {"rows_read": len(self.outcomes), **rows, "largest_id": self.largest_id, "kept": len(self.lengths)}


def default_cache_dir() -> Path:
    """Where entries lie when --data_cache_dir names no place: a folder of the user's own, which nobody else may enter."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-tokenized-rows"
    with suppress(OSError):  # `load_or_build` says why it cannot be used
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise UserError(f"{folder} belongs to another user. Name a folder of your own with --data_cache_dir.")
        folder.chmod(0o700)
    return folder


def load_or_build(cache_dir: Path, key: dict[str, Any], build: Callable[[], Iterable[Batch]]) -> TokenizedRows:
    """Open the entry of this key (the parts that decide the content, as JSON can write them), or build it.

    Of several processes that want the same entry the first builds; the others wait for it, however long it takes, and
    raise its UserError when it ends in one, instead of reading the whole file again to find the same mistake.
    """
    entry = cache_dir / _digest(key)
    with suppress(*DAMAGED):
        return _open(entry, check=True)
    failure, lock, began = entry.with_suffix(".error"), FileLock(entry.with_suffix(".lock")), time.time()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        for patience in (0, QUIET_WAIT_S, -1):  # seconds; -1: however long it takes
            if patience < 0:
                say(f"data: another process is tokenizing the same rows; waiting for it ({lock.lock_file})")
            with suppress(Timeout):
                lock.acquire(timeout=patience)
                break
        with suppress(*DAMAGED):
            return _open(entry, check=True)
        if patience != 0 and (problems := _noted(failure, began)):  # of the process that this one waited for
            raise UserError(problems)
        if entry.exists():
            say(f"data: the tokenized rows in {entry} are damaged; building them again")
        failure.unlink(missing_ok=True)  # an older build's; its cause may be fixed
        _build(entry, key, build())
        return _open(entry)
    except (OSError, UserError) as error:
        problems = getattr(error, "problems", None) or [
            f"{cache_dir}: the tokenized rows cannot be written here: {getattr(error, 'strerror', None) or error}. Name "
            "a folder on another disk with --data_cache_dir, or make room: this folder can be deleted at any time."
        ]
        with suppress(OSError):  # the error itself follows
            if lock.is_locked:  # never through a link that another user of the folder has put there
                with open(os.open(failure, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644), "w") as note:
                    json.dump(problems, note)
        raise UserError(problems) from None
    finally:
        lock.release()


def _noted(failure: Path, since: float) -> list[str]:
    """The problems in a note that a build left after a time; none in one that is older, of the future, or something else."""
    try:
        written, problems = failure.lstat().st_mtime, json.loads(failure.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    sound = isinstance(problems, list) and all(isinstance(problem, str) for problem in problems)
    return problems if sound and since - 1 <= written <= time.time() + 1 else []  # file systems round times


def map_ahead(function: Callable, items: Iterable) -> Iterator:
    """Results of function(item) in order, by a process for each core, with few items in work: bounded memory.

    A fast tokenizer's threads, all that helps where forks are unsafe (macOS), leave making Python's integers to one core.
    """
    # tokenizers (0.23) warns at each fork after its threads were used, unless the variable was set by hand
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    items = iter(items)
    first = list(islice(items, 2))
    if sys.platform != "linux" or len(first) < 2:  # starting processes takes longer than one item
        yield from map(function, chain(first, items))
        return
    count = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    waiting: deque = deque()
    with ProcessPoolExecutor(count, get_context("fork"), _start_worker, (function,)) as workers:
        for item in chain(first, items):
            waiting.append(workers.submit(_work, item))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_function: Callable  # of this worker: inherited at the fork, where sending it with each item would copy the tokenizer


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    gc.freeze()  # what was inherited is not searched for garbage, which would copy its pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer's threads did not survive the fork
    # A killed parent ends no child by itself (CPython 3.11): each would wait for work for ever.
    Thread(target=lambda: wait([parent_process().sentinel]) and os._exit(1), daemon=True).start()


def _work(item: Any) -> Any:
    return _function(item)


def file_digest(path: str | Path) -> str:
    """Digest of a file's bytes; about 1.3 GiB/s on one core, with or without SHA instructions."""
    digest = hashlib.blake2b(digest_size=16)
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything in a tokenizer that decides its ids; not of the padding that an earlier call left set."""
    if tokenizer.is_fast:
        state = tokenizer.backend_tokenizer.to_str()
        content: Any = state[state.index('"added_tokens"') :]  # before it stand version, truncation and padding
    else:
        files = [str(value) for _, value in sorted(tokenizer.init_kwargs.items()) if os.path.isfile(str(value))]
        content = [sorted(tokenizer.get_vocab().items()), [file_digest(path) for path in files]]
    return _digest([type(tokenizer).__name__, content, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}])


def _build(entry: Path, key: dict[str, Any], batches: Iterable[Batch]) -> None:
    building = entry.with_suffix(".building")
    for left in (building, entry):  # by a run that was killed, and damaged; the lock says that nobody writes there
        left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)
    building.mkdir()
    try:
        index, largest_id, at = [], 0, 0
        with open(building / "tokens.bin", "wb") as tokens:
            for batch in batches:
                tokens.write(batch.tokens)
                largest_id = max(largest_id, int(batch.tokens.max(initial=0)))
                index.append(batch._replace(switches=batch.switches + at)[1:])
                at += len(batch.tokens)
        for name, parts in zip(INDEX, zip(*index)):
            np.save(building / f"{name}.npy", np.concatenate(parts))
        files = {path.name: file_digest(path) for path in sorted(building.iterdir())}
        meta = json.dumps({"key": key, "files": files, "largest_id": largest_id}, indent=1)
        (building / "meta.json").write_text(meta)
        building.rename(entry)
    finally:
        shutil.rmtree(building, ignore_errors=True)  # nothing is there after the rename


def _open(entry: Path, check: bool = False) -> TokenizedRows:
    """Open the entry; one of DAMAGED is raised if it is not there or, when it is checked, not as it was written."""
    meta = read_object(entry / "meta.json")
    if check:
        files = {"tokens.bin", *(f"{name}.npy" for name in INDEX)}
        if _digest(meta["key"]) != entry.name or any(
            file_digest(entry / name) != meta["files"][name] for name in files
        ):
            raise ValueError(f"{entry}: damaged")
    index = {name: np.load(entry / f"{name}.npy") for name in INDEX}
    tokens = np.empty(0, np.int32)  # an empty file cannot be mapped
    if len(index["lengths"]):
        tokens = np.asarray(np.memmap(entry / "tokens.bin", np.int32, "r"))
    first_row = meta["key"].get("first_row", 2)
    return TokenizedRows(str(entry), tokens, largest_id=int(meta["largest_id"]), first_row=first_row, **index)


def _blocks(path: str | Path) -> Iterator[bytes]:
    """Read a file in blocks; through a memory map its pages would count as this process's memory."""
    with open(path, "rb") as file:
        while block := file.read(2**24):
            yield block
