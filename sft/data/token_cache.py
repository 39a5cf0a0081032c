"""Tokenized rows on disk: written once for each machine, memory-mapped by every rank.

An entry is a folder named by its key, a digest of everything that decides its content:

    tokens.bin           int32, the input_ids of all kept rows end to end
    lengths.npy          int32, tokens of each kept row; prompt_lengths.npy: how many of them are the prompt's
    outcomes.npy         uint8, what became of each row of the CSV: KEPT, CUT, EMPTY or NO_ROOM
    meta.json            the key's parts, size and CRC-32 of each file, the largest id

Labels follow from tokens and prompt lengths, so they are not stored. An entry is built beside its place, under a file
lock that the kernel releases when its holder dies, synced, then renamed: a folder with the final name is whole, or
has been damaged since, which the sizes and checksums show.
"""

import contextlib
import errno
import fcntl
import gc
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from sft.job import UserError, say

VERSION = 1  # raise it when the same parts of a key come to mean other tokens, or the files another form


OUTCOMES = ("kept", "cut", "empty", "no_room")  # of a row of the CSV


QUIET_WAIT_S = 2.0  # ranks of one machine ask at the same moment: a short wait for the first of them is no news


KEPT, CUT, EMPTY, NO_ROOM = range(4)


class Batch(NamedTuple):
    """Some rows of a CSV, tokenized."""

    tokens: np.ndarray  # int32, all kept rows end to end
    lengths: np.ndarray  # int32, one for each kept row
    prompt_lengths: np.ndarray  # int32, one for each kept row
    outcomes: np.ndarray  # uint8, one for each row of the CSV


@dataclass
class TokenizedRows:
    """An entry, opened. `tokens` is memory-mapped and read-only; it is opened anew, not copied, in another process."""

    folder: str
    tokens: np.ndarray  # (all tokens,) int32
    lengths: np.ndarray  # (kept rows,) int32
    prompt_lengths: np.ndarray  # (kept rows,) int32
    outcomes: np.ndarray  # (rows of the CSV,) uint8
    largest_id: int
    offsets: np.ndarray = field(init=False)  # (kept rows,) int64, where each row starts in `tokens`
    row_numbers: np.ndarray = field(init=False)  # (kept rows,) int64, the header is row 1

    def __post_init__(self):
        self.offsets = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self.row_numbers = self.rows_with("kept", "cut")

    def __reduce__(self):
        return _open_entry, (Path(self.folder),)

    def key(self) -> dict[str, Any]:
        """The parts that decided the content."""
        return json.loads((Path(self.folder) / "meta.json").read_text())["key"]

    def rows_with(self, *outcomes: str) -> np.ndarray:
        """Numbers of the CSV's rows that met one of these of OUTCOMES; the header is row 1."""
        return np.flatnonzero(np.isin(self.outcomes, [OUTCOMES.index(outcome) for outcome in outcomes])) + 2

    def prompt_digests(self) -> Iterator[int]:
        """For each kept row a number that says which prompt it has; another one in each process."""
        for start, length in zip(self.offsets.tolist(), self.prompt_lengths.tolist()):
            yield hash(self.tokens[start : start + length].tobytes())

    def counts(self) -> dict[str, int]:
        """How many rows were read, kept, cut and dropped, and how many tokens they have."""
        kept, cut, empty, no_room = np.bincount(self.outcomes, minlength=4).tolist()
        return {
            "rows_read": len(self.outcomes),
            "rows_empty": empty,
            "rows_no_room": no_room,
            "rows_cut": cut,
            "kept": kept + cut,
            "tokens": len(self.tokens),
            "trained_tokens": len(self.tokens) - int(self.prompt_lengths.sum(dtype=np.int64)),
            "largest_id": self.largest_id,
        }


def default_cache_dir() -> Path:
    """Where entries lie when --data_cache_dir names no place."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-tokenized-rows"


def load_or_build(cache_dir: Path, key: dict[str, Any], build: Callable[[], Iterable[Batch]]) -> TokenizedRows:
    """Open the entry of this key, or build it.

    Of several processes that want the same entry the first builds and the others wait for its lock, however long it
    takes. When the builder ends in a UserError, those that waited raise the same one.

    Args:
        key: the parts that decide the content, as JSON can write them.
        build: called only when there is no whole entry.
    """
    entry = cache_dir / hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    if rows := _open_whole(entry):
        return rows
    asked = time.time()
    failure = entry.with_suffix(".failed")
    with _lock(entry.with_suffix(".lock")):
        if rows := _open_whole(entry):
            return rows
        _raise_noted(failure, asked)
        if entry.exists():
            say(f"data: the tokenized rows in {entry} are damaged; building them again")
        try:
            with _writing(cache_dir):
                _build(entry, key, build())
        except UserError as error:
            with contextlib.suppress(OSError):  # the note spares the others a second attempt; the error itself follows
                failure.write_text(json.dumps({"time": time.time(), "problems": error.problems}))
            raise
        failure.unlink(missing_ok=True)
    return _open_entry(entry)


MOST_PROCESSES = 16  # one process reads and writes for about as many that tokenize


def map_ahead(function: Callable, items: Iterable) -> Iterator:
    """Results of function(item) in order, with as many items in work as keep the cores busy, and no more: bounded memory.

    Each core gets a process. A fast tokenizer's own threads leave making Python's integers, and freeing what the tokenizer
    returned, to one core; a tokenizer written in Python leaves everything. Where processes cannot be forked safely
    (macOS), threads do the work, more slowly.
    """
    if sys.platform == "linux":
        # tokenizers (0.23) warns at each fork after its threads were used, unless the variable was set by hand
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        count = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        workers: Executor = ProcessPoolExecutor(count, get_context("fork"), _start_worker, (function,))
        work = _work
    else:
        count = min(MOST_PROCESSES, os.cpu_count() or 1)
        workers, work = ThreadPoolExecutor(count), function
    waiting: deque = deque()
    with workers:
        for item in items:
            waiting.append(workers.submit(work, item))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_function: Callable  # of this worker: inherited at the fork, where sending it with each item would copy the tokenizer


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    gc.freeze()  # what was inherited is not searched for garbage, which would copy its pages
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer's threads did not survive the fork
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent ends no child by itself (CPython 3.11): each would wait for work for ever."""
    parent = parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _work(item: Any) -> Any:
    return _function(item)


def file_digest(path: str) -> str:
    """Digest of a file's bytes; about 1.3 GiB/s on one core, with or without SHA instructions."""
    digest = hashlib.blake2b(digest_size=16)
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything in a tokenizer that decides its ids; not of the padding that an earlier call left set."""
    content: Any
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
        content = content[content.index('"added_tokens"') :]  # before it stand version, truncation and padding
    else:
        files = [str(value) for _, value in sorted(tokenizer.init_kwargs.items()) if os.path.isfile(str(value))]
        content = [sorted(tokenizer.get_vocab().items()), [file_digest(path) for path in files]]
    content = [type(tokenizer).__name__, content, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _build(entry: Path, key: dict[str, Any], batches: Iterable[Batch]) -> None:
    building = entry.with_suffix(".building")
    for left in (building, entry):  # by a run that was killed, and damaged; the lock says that nobody writes there
        if left.exists():
            shutil.rmtree(left)
    building.mkdir()
    try:
        checksum, largest_id = 0, 0
        index: dict[str, list[np.ndarray]] = {"lengths": [], "prompt_lengths": [], "outcomes": []}
        with open(building / "tokens.bin", "wb") as tokens:
            for batch in batches:
                tokens.write(batch.tokens)
                checksum = zlib.crc32(batch.tokens, checksum)
                largest_id = max(largest_id, int(batch.tokens.max(initial=0)))
                for name, parts in index.items():
                    parts.append(getattr(batch, name))
        for name, parts in index.items():
            np.save(building / f"{name}.npy", np.concatenate(parts))
        files = {path.name: [path.stat().st_size, _crc32(path)] for path in sorted(building.glob("*.npy"))}
        files["tokens.bin"] = [(building / "tokens.bin").stat().st_size, checksum]
        meta = {"key": key, "files": files, "largest_id": largest_id}
        (building / "meta.json").write_text(json.dumps(meta, indent=1))
        for path in [*building.iterdir(), building]:
            _sync(path)
        building.rename(entry)
        _sync(entry.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)  # what cannot be removed is removed by the next build
        raise


def _open_whole(entry: Path) -> TokenizedRows | None:
    """Open the entry if it is there and its files are as they were written."""
    try:
        files = json.loads((entry / "meta.json").read_text())["files"]
        for name, (size, checksum) in files.items():
            if (entry / name).stat().st_size != size or _crc32(entry / name) != checksum:
                return None
    except (OSError, ValueError, KeyError):  # not there, or damaged; where it cannot be read, the lock says so
        return None
    return _open_entry(entry)


def _open_entry(entry: Path) -> TokenizedRows:
    arrays = {name: np.load(entry / f"{name}.npy") for name in ("lengths", "prompt_lengths", "outcomes")}
    if arrays["lengths"].size:
        tokens = np.asarray(np.memmap(entry / "tokens.bin", dtype=np.int32, mode="r"))
    else:
        tokens = np.empty(0, np.int32)  # an empty file cannot be mapped
    largest_id = json.loads((entry / "meta.json").read_text())["largest_id"]
    return TokenizedRows(folder=str(entry), tokens=tokens, largest_id=largest_id, **arrays)


def _crc32(path: Path) -> int:
    checksum = 0
    for block in _blocks(path):
        checksum = zlib.crc32(block, checksum)
    return checksum


def _blocks(path: str | Path) -> Iterator[bytes]:
    """Read a file in blocks; through a memory map its pages would count as this process's memory."""
    with open(path, "rb") as file:
        while block := file.read(2**24):
            yield block


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_within(descriptor: int, seconds: float) -> bool:
    """Take the lock if it becomes free in this time."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _writing(path.parent):
            if not _lock_within(descriptor, QUIET_WAIT_S):
                say(f"data: another process is tokenizing the same rows; waiting for it ({path})")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the file system's refusals into a message that says where the cache is and how to move it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full"
        else:
            reason = f"{error.strerror or error}"
        raise UserError(
            f"{folder}: the tokenized rows cannot be written here: {reason}. "
            "Name a folder on another disk with --data_cache_dir, or make room: this folder can be deleted at any time."
        ) from None


def _raise_noted(failure: Path, asked: float) -> None:
    """Raise the UserError in which another process's build ended while this one waited; an older one may be mended."""
    try:
        note = json.loads(failure.read_text())
    except (FileNotFoundError, ValueError):  # ValueError: a full disk cut the note short
        return
    if note["time"] > asked:
        raise UserError(note["problems"])
