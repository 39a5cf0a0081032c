"""Read a CSV strictly: every cell byte for byte, and every fault with the row that holds it.

Read by Python's csv.reader and not by pandas, which (3.1.1) pads a row that lacks a field, makes the first column an
index when the first row has a field too many, drops a stray quote, and counts a bad byte from inside its own buffer.
Rows are numbered as a spreadsheet shows them: the header is row 1, the first record row 2, a blank line is a row.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from sft.job import UserError

LARGEST_CELL = 64 * 2**20  # characters; beyond it a quote was never closed, and the rest of the file would be one cell
PROBLEMS_SHOWN = 10
ROWS_BETWEEN_PROGRESS = 256  # to ask where a file is costs as much as reading a short row
NUL, BAD_BYTE = "\0", re.compile("[\0\udc80-\udcff]")


def read_csv(
    path: str,
    columns: Mapping[str, str | None],
    progress: Callable[[int], object] = lambda bytes_read: None,
    delimiter: str = ",",
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (row number, its cells in these columns) of every record; all cells are empty for a blank line.

    After the first faulty row nothing more is yielded, and the rest is read for further faults: a UserError names the first
    ten, each with its row.

    Args:
        columns: each column with the flag that names it; None for one that may be missing, whose cells are then empty.
        progress: called with the number of bytes read.
    """
    csv.field_size_limit(LARGEST_CELL)
    problems = []
    row_number = 0  # of the last row that was read whole
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=delimiter)
            header = next(reader, [])
            row_number = 1
            problems = _bad_bytes(f"{path}, row 1", [], header) or _header_problems(path, header, columns, delimiter)
            if problems:
                raise UserError(problems)
            places = [header.index(name) if name in header else len(header) for name in columns]
            for row_number, row in enumerate(reader, 2):
                if row and len(row) != len(header):
                    problems.append(
                        f"{path}, row {row_number}: {len(row)} field{'s' * (len(row) > 1)} where the header has {len(header)}. "
                        "Add the missing ones, or put a cell that holds a comma in quotes."
                    )
                elif (not (text := "".join(row)).isascii() or NUL in text) and (
                    bad := _bad_bytes(f"{path}, row {row_number}", header, row)
                ):
                    problems += bad
                    break  # the whole file may be of another encoding
                elif not problems:
                    row = [*row, ""] if row else [""] * (len(header) + 1)
                    yield row_number, tuple([row[place] for place in places])
                    if row_number % ROWS_BETWEEN_PROGRESS == 0:
                        progress(file.buffer.tell())  # type: ignore[attr-defined]  # a file has it
                if len(problems) == PROBLEMS_SHOWN:
                    break
    except OSError as error:
        problems.append(f"{path}: {error.strerror}. Give a file that can be read.")
    except csv.Error as error:
        said = str(error).split(" (")[0].replace(f"'{delimiter}'", "','")
        problems.append(f"{path}, row {row_number + 1}: {_CURES.get(said, str(error))}")
    if problems:
        raise UserError(problems)
    progress(os.path.getsize(path))
    if row_number == 1:
        raise UserError(f"{path}: a header and no rows. Add the training examples below it.")


_CURES = {  # what csv.reader says -> what to do
    "unexpected end of data": "a quote is opened and never closed. Close it; a quote inside a cell is written twice.",
    "field larger than field limit": f"a cell above {LARGEST_CELL // 2**20} Mi characters. A quote that is opened and "
    "never closed does that: close it; a quote inside a cell is written twice.",
    "line contains NUL": "a NUL byte. Remove it.",  # Python 3.10; later ones hand it over, and the column is named above
    "',' expected after '\"'": "text after a closing quote. A quote inside a cell is written twice.",
}


def quoted(text: str, longest: int = 60) -> str:
    """The text in quotes for a message: one line, control characters and escape sequences spelt out, shortened."""
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")


def column_problems(path: str, there: list[str], columns: Mapping[str, str | None]) -> list[str]:
    """The columns that a file lacks."""
    named = f"Its columns are {', '.join(quoted(name) for name in there[:50])}"
    missing = [(name, flag) for name, flag in columns.items() if flag and name not in there]
    return [f"{path}: no column {quoted(name)}. {named}. Name the right one with {flag}." for name, flag in missing]


def _header_problems(path: str, header: list[str], columns: Mapping[str, str | None], delimiter: str) -> list[str]:
    if not header:
        empty = os.path.getsize(path) == 0
        return [f"{path}: {'the file is empty' if empty else 'row 1 is blank'}. Its first row must name the columns."]
    needed, line = {name for name, flag in columns.items() if flag}, delimiter.join(header)
    for other, name in {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}.items():
        if not needed <= set(header) and needed <= {cell.strip('" ') for cell in line.split(other)}:
            named = "Name it .tsv" if other == "\t" else "Name it .csv" if other == "," else "Save it with commas"
            return [f"{path}: its columns are separated by {name} ({quoted(other)}). {named}."]
    return column_problems(path, header, columns) + [
        f"{path}: {header.count(name)} columns are named {quoted(name)}. Rename or remove one."
        for name in dict.fromkeys(header)
        if name and header.count(name) > 1  # unnamed columns are what spreadsheets add
    ]


def _bad_bytes(where: str, header: list[str], row: list[str]) -> list[str]:
    """The first byte of a row that is NUL or not UTF-8 (surrogateescape: a surrogate)."""
    text = "".join(row)
    with suppress(UnicodeEncodeError):
        if not text.isascii():
            text.encode()
        if NUL not in text:
            return []
    place, byte = next((i, found[0]) for i, cell in enumerate(row) if (found := BAD_BYTE.search(cell)))
    column = f", column {quoted(header[place])}" if header else ""
    fault = f"byte 0x{ord(byte) - 0xDC00:02x} is not UTF-8. Save the file as UTF-8."
    return [f"{where}{column}: {'a NUL byte. Remove it.' if byte == NUL else fault}"]
