"""Every cell is read as it stands, and what is wrong with a file is said with its row."""

import csv
import io
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows_at_hand import CELLS, MANY, problems_of

from sft.data import csv_rows, files
from sft.data.files import read_rows

PAIR = {"prompt": "--source", "response": "--target"}


def read(path) -> list[tuple]:
    return [(number, *cells) for number, cells in read_rows(path, PAIR)]


def faults(path) -> list[str]:
    return problems_of(read, path)


@MANY
@given(
    cells=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    bom=st.booleans(),
)
def test_every_cell_is_read_byte_for_byte(write, cells, line_end, bom):
    text = io.StringIO(newline="")
    # csv.writer (3.11) leaves a line feed unquoted unless it ends lines with one.
    quoting = csv.QUOTE_MINIMAL if line_end == "\r\n" else csv.QUOTE_ALL
    writer = csv.writer(text, quoting=quoting, lineterminator=line_end)
    writer.writerows([("response", "other", "prompt"), *cells])
    path = write(("\ufeff" if bom else "") + text.getvalue())
    with open(path, encoding="utf-8-sig", newline="") as file:
        expected = [(number, row[2], row[0]) for number, row in enumerate(csv.reader(file), 1)][1:]
    assert [row[::-1] for row in cells] == [(p, other, r) for (_, p, r), (_, other, _) in zip(expected, cells)]
    assert read(path) == expected


def test_text_that_other_readers_change_stays_text(write):
    path = write('prompt,response\r\nNA,18\r\n" a ","1\r\n2\r"\r\n"say ""hi""",nan\r\n')
    assert read(path) == [
        (2, "NA", "18"),
        (3, " a ", "1\r\n2\r"),
        (4, 'say "hi"', "nan"),
    ]


def test_a_blank_line_is_a_row_with_nothing_in_it(write):
    assert read(write("prompt,response\na,b\n\nc,d\n")) == [
        (2, "a", "b"),
        (3, "", ""),
        (4, "c", "d"),
    ]


def test_batches_are_bounded_in_rows_and_in_characters(write, monkeypatch):
    monkeypatch.setattr(files, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(files, "CHARACTERS_PER_BATCH", 10)
    path = write([("a", "b")] * 4 + [("c" * 5, "d" * 5), ("e", "f"), ("g", "h")])
    sizes = [len(batch) for batch in files.read_batches(path, PAIR, True, False)]
    assert sizes == [3, 2, 2]  # three rows; 12 characters are above 10; what is left


def test_a_very_long_cell(write):
    cell = "word, \n" * 300_000  # 2.1 million characters; csv's own limit is 131,072
    assert read(write([(cell, "b")])) == [(2, cell, "b")]


NUL_COLUMN = ", column 'response'" if sys.version_info >= (3, 11) else ""  # csv.reader itself refuses it in Python 3.10


@pytest.mark.parametrize(
    "content, said",
    [
        ("", ": the file is empty. Its first row must name the columns."),
        ("\nprompt,response\n", ": row 1 is blank. Its first row must name the columns."),
        ("prompt,response\n", ": a header and no rows. Add the training examples below it."),
        ("prompt,response\na,b\nc\n", ", row 3: 1 field where the header has 2. Add the missing ones, or put a cell that holds a comma in quotes."),
        ("prompt,response\na,b,c\n", ", row 2: 3 fields where the header has 2. Add the missing ones, or put a cell that holds a comma in quotes."),
        ('prompt,response\na,b\n"c\n\n,d\n', ", row 3: a quote is opened and never closed. Close it; a quote inside a cell is written twice."),
        ('prompt,response\na,"b"c"\n', ", row 2: text after a closing quote. A quote inside a cell is written twice."),
        ("prompt,response\na,b\nc,d\0e\n", f", row 3{NUL_COLUMN}: a NUL byte. Remove it."),
        (b"prompt,response\n\xff,b\n", ", row 2, column 'prompt': byte 0xff is not UTF-8. Save the file as UTF-8."),
        (b'\xef\xbb\xbfprompt,response\n"\xc3\xa9\n\n",b\nc,d\xc3\n', ", row 3, column 'response': byte 0xc3 is not UTF-8. Save the file as UTF-8."),
        (b"prompt,response\na,b\xe2\x82", ", row 2, column 'response': byte 0xe2 is not UTF-8. Save the file as UTF-8."),
        ("prompt,response\na,b\n".encode("utf-16"), ": text in UTF-16. Save it as UTF-8: iconv -f UTF-16 -t UTF-8."),
        ("prompt,respond\na,b\n", ": no column 'response'. Its columns are 'prompt', 'respond'. Name the right one with --target."),
        ("prompt;response\na;b\n", ": its columns are separated by semicolons (';'). Save it with commas."),
        ("prompt,response,prompt\na,b,c\n", ": 2 columns are named 'prompt'. Rename or remove one."),
    ],
)  # fmt: skip
def test_each_fault_is_one_message_with_its_row(write, content, said):
    path = write(content)
    assert faults(path) == [path + line for line in ([said] if isinstance(said, str) else said)]


def test_faults_of_many_rows_are_said_together_and_no_row_follows_the_first(write):
    path = write("prompt,response\na,b\nc\nd,e\n" + "f,g,h\n" * 20)
    found = []
    said = problems_of(lambda: found.extend(read_rows(path, PAIR)))
    assert found == [(2, ("a", "b"))]
    assert [line.split(":")[0] for line in said] == [f"{path}, row {row}" for row in (3, 5, 6, 7, 8, 9, 10, 11, 12, 13)]


def test_a_cell_without_end_does_not_fill_the_memory(write, monkeypatch):
    monkeypatch.setattr(csv_rows, "LARGEST_CELL", 100)
    path = write('prompt,response\na,"b\n' + "c,d\n" * 100)
    assert [line.split(" Mi ")[0] for line in faults(path)] == [f"{path}, row 2: a cell above 64"]


def test_files_that_cannot_be_read(tmp_path):
    assert faults(str(tmp_path / "no.csv")) == [
        f"{tmp_path}/no.csv: No such file or directory. Give a file that can be read."
    ]
    assert faults(str(tmp_path)) == [f"{tmp_path}: Is a directory. Give a file that can be read."]
    if os.path.exists("/proc/self/mem"):  # opens, and fails when it is read
        assert faults("/proc/self/mem") == ["/proc/self/mem: Input/output error. Give a file that can be read."]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(write):
    path = write("prompt,response\na,b\n")
    os.chmod(path, 0)
    assert faults(path) == [f"{path}: Permission denied. Give a file that can be read."]


def test_a_message_never_sends_a_cell_to_the_terminal(write):
    (line,) = faults(write("prompt,\x1b[31mresponse\u202e\na,b\n"))
    assert line.isprintable() and r"'\x1b[31mresponse\u202e'" in line


def test_columns_without_a_name_may_be_several(write):
    assert read(write("prompt,response,,\na,b,,\n")) == [(2, "a", "b")]
