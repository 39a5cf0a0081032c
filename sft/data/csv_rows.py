"""Read a CSV strictly: every cell byte for byte, and every fault with the row that holds it.

Read by Python's csv.reader and not by pandas, which (3.1.1) pads a row that lacks a field, makes the first column an
index when the first row has a field too many, drops a stray quote, and counts a bad byte from inside its own buffer.
Rows are numbered as a spreadsheet shows them: the header is row 1, the first record row 2, a blank line is a row.
"""

import csv
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from tqdm import tqdm

from sft.job import UserError

LARGEST_CELL = 64 * 2**20  # characters; beyond it a quote was never closed, and the rest of the file would be one cell
PROBLEMS_SHOWN = 10
NUL, BAD_BYTE = "\0", re.compile("[\0\udc80-\udcff]")
ROWS_PER_BATCH, CHARACTERS_PER_BATCH = 256, 2**20  # small, so that all cores end together; bounded in memory


def read_csv(
    path: str, source: str, target: str | None, progress: Callable[[int], object] = lambda bytes_read: None
) -> Iterator[tuple[int, str, str]]:
    """Yield (row number, source cell, target cell) of every record; both cells are empty for a blank line.

    Without a target (questions, no answers) every target cell is empty. After the first faulty row nothing more is
    yielded, and the rest is read for further faults: a UserError names the first ten, each with its row.
    """
    csv.field_size_limit(LARGEST_CELL)
    problems = []
    row_number = 0  # of the last row that was read whole
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            row_number = 1
            problems = _bad_bytes(f"{path}, row 1", [], header) or _header_problems(path, header, source, target)
            if problems:
                raise UserError(problems)
            at_source, at_target = header.index(source), None if target is None else header.index(target)
            for row_number, row in enumerate(reader, 2):
                where = f"{path}, row {row_number}"
                if row and len(row) != len(header):
                    problems.append(
                        f"{where}: {len(row)} field{'s' * (len(row) > 1)} where the header has {len(header)}. "
                        "Add the missing ones, or put a cell that holds a comma in quotes."
                    )
                elif bad := _bad_bytes(where, header, row):
                    problems += bad
                    break  # the whole file may be of another encoding
                elif not problems:
                    row = row or [""] * len(header)
                    yield row_number, row[at_source], "" if at_target is None else row[at_target]
                    progress(file.buffer.tell())  # type: ignore[attr-defined]  # a file has it
                if len(problems) == PROBLEMS_SHOWN:
                    break
    except OSError as error:
        problems.append(f"{path}: {error.strerror}. Give a CSV file that can be read.")
    except csv.Error as error:
        problems.append(f"{path}, row {row_number + 1}: {_CURES.get(str(error).split(' (')[0], str(error))}")
    if problems:
        raise UserError(problems)
    if row_number == 1:
        raise UserError(f"{path}: a header and no rows. Add the training examples below it.")


_CURES = {  # what csv.reader says -> what to do
    "unexpected end of data": "a quote is opened and never closed. Close it; a quote inside a cell is written twice.",
    "field larger than field limit": f"a cell above {LARGEST_CELL // 2**20} Mi characters. A quote that is opened and "
    "never closed does that: close it; a quote inside a cell is written twice.",
    "line contains NUL": "a NUL byte. Remove it.",  # Python 3.10; later ones hand it over, and the column is named above
    "',' expected after '\"'": "text after a closing quote. A quote inside a cell is written twice.",
}


def read_batches(path: str, source: str, target: str) -> Iterator[list[tuple[str, str]]]:
    """Yield the rows in batches of (source cell, target cell), with a progress bar over the file's bytes."""
    seconds = 0.1 if sys.stderr.isatty() else 60  # a log file needs no animation
    size, title = os.path.getsize(path), f"tokenizing {path}"
    with tqdm(total=size, unit="B", unit_scale=True, desc=title, mininterval=seconds) as bar:
        batch: list[tuple[str, str]] = []
        characters = 0
        for _, prompt, response in read_csv(path, source, target, lambda at: bar.update(at - bar.n)):
            batch.append((prompt, response))
            characters += len(prompt) + len(response)
            if len(batch) == ROWS_PER_BATCH or characters > CHARACTERS_PER_BATCH:
                yield batch
                batch, characters = [], 0
        yield batch


def header_problems(path: str, source: str, target: str | None) -> list[str]:
    """Problems that a CSV's first rows show: the file, and its columns."""
    try:
        next(read_csv(path, source, target))
    except UserError as error:
        return error.problems
    return []


def quoted(text: str, longest: int = 60) -> str:
    """The text in quotes for a message: one line, control characters and escape sequences spelt out, shortened."""
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")


def _header_problems(path: str, header: list[str], source: str, target: str | None) -> list[str]:
    if not header:
        empty = os.path.getsize(path) == 0
        return [f"{path}: {'the file is empty' if empty else 'row 1 is blank'}. Its first row must name the columns."]
    columns = f"Its columns are {', '.join(quoted(name) for name in header[:50])}"
    problems = [
        f"{path}: no column {quoted(name)}. {columns}. Name the right one with {flag}."
        for name, flag in ((source, "--source"), (target, "--target"))
        if name is not None and name not in header
    ]
    problems += [
        f"{path}: {header.count(name)} columns are named {quoted(name)}. Rename or remove one."
        for name in dict.fromkeys(header)
        if name and header.count(name) > 1  # unnamed columns are what spreadsheets add
    ]
    if source == target:
        problems.append(f"{path}: --source and --target are both {quoted(source)}. Name two columns.")
    return problems


def _bad_bytes(where: str, header: list[str], row: list[str]) -> list[str]:
    """The first byte of a row that is NUL or not UTF-8 (surrogateescape: a surrogate)."""
    text = "".join(row)
    with suppress(UnicodeEncodeError):
        text.encode()
        if NUL not in text:
            return []
    place, byte = next((i, found[0]) for i, cell in enumerate(row) if (found := BAD_BYTE.search(cell)))
    column = f", column {quoted(header[place])}" if header else ""
    fault = f"byte 0x{ord(byte) - 0xDC00:02x} is not UTF-8. Save the file as UTF-8."
    return [f"{where}{column}: {'a NUL byte. Remove it.' if byte == NUL else fault}"]
