"""Read rows from CSV, TSV, JSON, JSON lines and parquet files, each with its number there, and tell what another file is.

JSON is read by Python's json and not by pandas, which (3.0) names no line, makes floats of integers next to a null, and
cannot give a number as it is written. JSON lines and parquet are read in pieces; a list in a .json file is held whole.
"""

import json
import os
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from sft.data.csv_rows import PROBLEMS_SHOWN, column_problems, quoted, read_csv
from sft.job import UserError
from sft.outside import printable

KINDS = {".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}  # else csv
ROWS_PER_BATCH, CHARACTERS_PER_BATCH = 256, 2**20  # small, so that all cores end together; bounded in memory

# How other files begin -> what they are, and what to do.
DISGUISES = [
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "a compressed file. Unpack it first."),
    (rb"PK\x03\x04.{4,2000}?(xl/|\[Content_Types\])|\xd0\xcf\x11\xe0", "a spreadsheet (Excel). Save it as CSV UTF-8."),
    (rb"PK\x03\x04", "a zip archive. Unpack it first."),
    (rb"\xff\xfe|\xfe\xff|.\0.\0|\0.\0.", "text in UTF-16. Save it as UTF-8: iconv -f UTF-16 -t UTF-8."),
    (rb"version https://git-lfs", "a Git LFS pointer in the place of the file. Fetch the file itself: git lfs pull."),
    (rb"ARROW1|SQLite format 3", "a database or Arrow file. Export it as parquet, JSON lines or CSV."),
    (rb"(?i)\s*<(!doctype )?html", "a web page. Download the file itself (on the hub: the link `download`)."),
]


class DataFile(NamedTuple):
    """A file of --data_path, and how often its rows are taken: FILE, FILE*3 (each three times), FILE*0.5 (half of them)."""

    path: str
    times: float = 1

    @classmethod
    def of(cls, text: str) -> "DataFile":
        match = None if os.path.exists(text) else re.fullmatch(r"(.+)\*(\d*\.?\d+)", text)
        return cls(match[1], float(match[2])) if match else cls(text)

    def problems(self) -> list[str]:
        if 0 < self.times < 1 or (self.times >= 1 and self.times == int(self.times)):
            return []
        cure = "Give a whole number of repeats (FILE*3) or a share below 1 (FILE*0.5)."
        return [f"{self.path}*{self.times:g}: its rows cannot be taken {self.times:g} times. {cure}"]


def kind_of(path: str) -> str:
    return KINDS.get(Path(path).suffix.lower(), "csv")


def first_row(path: str) -> int:
    """The number of the first row: below a CSV's header it is 2, as a spreadsheet shows it; a line of JSON lines is a row."""
    return 2 if kind_of(path) in ("csv", "tsv") else 1


def read_rows(
    path: str,
    columns: Mapping[str, str | None],
    text: bool = True,
    allow_numbers: bool = False,
    progress: Callable[[int], object] = lambda bytes_read: None,
) -> Iterator[tuple[int, tuple]]:
    """Yield (row number, its cells in these columns); a cell that is empty, absent or null is "".

    Faults end the reading as in `read_csv`: one UserError with the first ten.

    Args:
        columns: each column with the flag that names it; None for one that may be missing.
        text: cells must be text. False hands on the lists of JSON and parquet too.
        allow_numbers: take numbers as they are written, in place of refusing them.
    """
    kind = kind_of(path)
    if what := _disguise(path, kind):
        raise UserError(f"{path}: {what}")
    if kind in ("csv", "tsv"):
        yield from read_csv(path, columns, progress, "\t" if kind == "tsv" else ",")
        return
    records: Iterator[tuple[int, Any]] = (_parquet if kind == "parquet" else _json)(
        path, columns, allow_numbers, progress
    )
    problems: list[str] = []
    row_number = 0
    try:
        for row_number, record in records:
            if isinstance(record, dict):
                cells = tuple([record.get(name) for name in columns])
                if text and not all(isinstance(cell, str) and cell.isascii() for cell in cells):
                    cells, found = _texts(cells, f"{path}, row {row_number}", [*columns], allow_numbers)
                    problems += found
                if not problems:
                    yield row_number, cells
            else:
                problems.append(f"{path}, {record}")
            if len(problems) >= PROBLEMS_SHOWN:
                break
    except OSError as error:
        problems.append(f"{path}: {error.strerror or error}. Give a file that can be read.")
    if problems:
        raise UserError(problems)
    if not row_number:
        raise UserError(f"{path}: no rows in it. Add the training examples.")


def read_batches(
    path: str, columns: Mapping[str, str | None], text: bool, allow_numbers: bool
) -> Iterator[list[tuple[int, tuple]]]:
    """Yield the rows of `read_rows` in batches, with a progress bar over the file's bytes."""
    seconds = 0.1 if sys.stderr.isatty() else 60  # a log file needs no animation
    size, title = os.path.getsize(path), printable(f"tokenizing {path}")
    with tqdm(total=size, unit="B", unit_scale=True, desc=title, mininterval=seconds) as bar:
        batch: list[tuple[int, tuple]] = []
        characters = 0
        for row in read_rows(path, columns, text, allow_numbers, lambda at: bar.update(at - bar.n)):
            batch.append(row)
            characters += sum([len(cell) for cell in row[1] if isinstance(cell, (str, list))])
            if len(batch) == ROWS_PER_BATCH or characters > CHARACTERS_PER_BATCH:
                yield batch
                batch, characters = [], 0
        yield batch


def header_problems(path: str, *how: Any) -> list[str]:
    """Problems that a file's first rows show: the file, and its columns."""
    try:
        next(read_rows(path, *how))
    except UserError as error:
        return error.problems
    return []


def _disguise(path: str, kind: str) -> str | None:
    """What the file is, and what to do, when it is not what its name says."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:  # its reader tells
        return None
    for begins, what in DISGUISES:
        if re.match(begins, head, re.DOTALL):
            return what
    if (head[:4] == b"PAR1") != (kind == "parquet"):
        return "not a parquet file." if kind == "parquet" else "a parquet file. Name it .parquet."
    if kind in ("csv", "tsv") and re.match(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"', head):
        return "JSON, not CSV. Name it .json (a list) or .jsonl (one object in each line)."
    return None


def _texts(cells: tuple, where: str, names: list[str], allow_numbers: bool) -> tuple[tuple, list[str]]:
    """The cells as texts, and what is wrong with those that are none."""
    texts, problems = [], []
    for name, cell in zip(names, cells):
        if cell is None or cell != cell:  # NaN is how a table of numbers has no value
            cell = ""
        elif allow_numbers and isinstance(cell, bool | int | float | Decimal):
            cell = str(cell).lower() if isinstance(cell, bool) else str(cell)
        if not isinstance(cell, str):
            what, cure = f"a {type(cell).__name__}, not text", "Write it as text."
            if isinstance(cell, bool | int | float | Decimal):
                value = str(cell).lower() if isinstance(cell, bool) else f"the number {cell}"
                what, cure = f"{value}, not text", "Write it as text, or add --allow_numbers True."
            elif isinstance(cell, list | dict):
                cure = f"A conversation is read with --messages {name}."
            problems.append(f"{where}, column {quoted(name)}: {what}. {cure}")
        elif problem := bad_text(cell):
            problems.append(f"{where}, column {quoted(name)}: {problem}")
        texts.append(cell)
    return tuple(texts), problems


def bad_text(text: str) -> str | None:
    """What is wrong with a text of JSON that has no UTF-8: \\ud83d without the other half of its pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half of a pair (\\u{ord(text[error.start]):04x}). Write the whole character."
    return None


class RepeatedKey(NamedTuple):
    """Stands for an object of JSON that has a key twice, of which Python's json would silently take the last."""

    key: str

    def __str__(self) -> str:
        return f"the key {quoted(self.key)} stands in it twice. Remove one."


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | RepeatedKey:
    """An object of JSON by its keys and values."""
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    keys = [key for key, _ in pairs]
    return RepeatedKey(next(key for key in keys if keys.count(key) > 1))


def _json(
    path: str, columns: Mapping[str, str | None], as_written: bool, progress: Callable[[int], object]
) -> Iterator[tuple[int, Any]]:
    """Each object of a list, or of a line; in place of one that is none, what it is."""
    as_text = {"parse_int": str, "parse_float": str, "parse_constant": str} if as_written else {}
    decode = json.JSONDecoder(object_pairs_hook=unique, **as_text).decode  # type: ignore[arg-type]
    with open(path, "rb") as file:
        start = file.read(64)
        file.seek(3 if start.startswith(BOM_UTF8) else 0)
        is_list = start.removeprefix(BOM_UTF8).lstrip()[:1] == b"[" and kind_of(path) == "json"
        lines = [file.read()] if is_list else file
        records = _decoded(lines, decode, is_list, progress)
        head = list(islice(records, ROWS_PER_BATCH))
        there = dict.fromkeys(name for _, record in head if isinstance(record, dict) for name in record)
        if there and (problems := column_problems(path, [*there], columns)):
            raise UserError(problems)
        yield from chain(head, records)


def _decoded(lines: Any, decode: Callable[[str], Any], is_list: bool, progress: Callable) -> Iterator[tuple[int, Any]]:
    at = 0
    for number, line in enumerate(lines, 1):
        at += len(line)
        try:
            text = line.decode()
            record = decode(text) if text.strip() else {}
        except UnicodeDecodeError as error:
            number += line.count(b"\n", 0, error.start)
            yield number, f"line {number}: byte 0x{line[error.start]:02x} is not UTF-8. Save the file as UTF-8."
            return
        except json.JSONDecodeError as error:
            hint = " (a .json file holds a list of objects, or one object in each line)" * (number == 1 and not is_list)
            number += error.lineno - 1
            yield number, f"line {number}, column {error.colno}: not JSON: {error.msg}{hint}."
        except (ValueError, RecursionError):  # of a number with thousands of digits; of brackets
            yield number, f"line {number}: not JSON that can be read: nested too deeply, or a number too long."
        else:
            for index, item in enumerate(record if is_list else [record], 1 if is_list else number):
                if isinstance(item, RepeatedKey):
                    item = f"row {index}: {item}"
                elif not isinstance(item, dict):
                    item = f"row {index}: a {type(item).__name__}, not an object with named columns."
                yield index, item
        progress(at)


def _parquet(
    path: str, columns: Mapping[str, str | None], as_written: bool, progress: Callable[[int], object]
) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: a parquet file needs pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        there, rows = file.schema_arrow.names, 0
        if problems := column_problems(path, there, columns):
            raise UserError(problems)
        size = os.path.getsize(path)
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=[name for name in columns if name in there]):
            for record in batch.to_pylist():
                rows += 1
                yield rows, record
            progress(size * rows // file.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: a damaged parquet file ({str(error).splitlines()[0]}).") from error
