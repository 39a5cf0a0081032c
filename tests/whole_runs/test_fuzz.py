"""Thousands of broken CSVs through the data path: each gives the right rows, or one message that names the file.

What is right is told by a reader written for this test, from RFC 4180 alone, one character at a time.
"""

import random
import shutil
import time

import pytest
from characters import BOS, EOS, character_tokenizer

import utils
from sft.data import checks, token_cache
from sft.flags import DataArguments, TrainingArguments
from sft.job import UserError

INPUTS, SEED, MAX_LENGTH = 2500, 6, 48


class Broken(Exception):
    """The reader of this test has no reading of the text."""


def records_of(text: str) -> list[list[str]]:
    """Every record of a CSV; a blank line is an empty one.

    a,"b ""c""\\n2"\\r\\n\\nd, -> [["a", 'b "c"\\n2'], [], ["d", ""]]
    """
    records, fields, field, state = [], [], "", "start"  # start of a field, plain, quoted, or after a closing quote
    position = 0
    while position <= len(text):
        char = text[position] if position < len(text) else None
        position += 1
        if state == "quoted":
            if char is None:
                raise Broken("a quote is not closed")
            if char != '"':
                field += char
            elif text[position : position + 1] == '"':
                field += '"'
                position += 1
            else:
                state = "closed"
        elif char == '"' and state == "start":
            state = "quoted"
        elif char == ",":
            fields, field, state = [*fields, field], "", "start"
        elif char in ("\n", "\r", None):
            if char == "\r" and text[position : position + 1] == "\n":
                position += 1
            if fields or field or state == "closed":
                records.append([*fields, field])
            elif char is not None:
                records.append([])
            fields, field, state = [], "", "start"
        elif state == "closed":
            raise Broken("text after a closing quote")
        else:
            field, state = field + char, "plain"
    return records


def test_the_reader_of_this_test():
    assert records_of('a,"b ""c""\n2"\r\n\nd,') == [["a", 'b "c"\n2'], [], ["d", ""]]
    assert records_of('a"b,\r"",""\r') == [['a"b', ""], ["", ""]]
    for broken in ('"a', '"a"b'):
        with pytest.raises(Broken):
            records_of(broken)


def expected(content: bytes) -> list[tuple[int, list[int]]] | None:
    """(row number, input_ids) of every example that a CSV gives; None when it must be refused."""
    try:
        records = records_of(content.decode("utf-8-sig"))
    except (Broken, UnicodeDecodeError):
        return None
    header = records[0] if records else []
    named = [name for name in header if name]
    if "prompt" not in header or "response" not in header or len(set(named)) < len(named) or len(records) < 2:
        return None
    if any("\0" in name for name in header):
        return None
    examples = []
    for number, record in enumerate(records[1:], start=2):
        if (record and len(record) != len(header)) or any("\0" in cell for cell in record):
            return None
        prompt, response = (record[header.index(name)] if record else "" for name in ("prompt", "response"))
        prompt_ids, response_ids = [BOS, *prompt.encode()], [*response.encode(), EOS]
        if prompt.strip() and response.strip() and len(prompt_ids) < MAX_LENGTH:
            examples.append((number, [*prompt_ids, *response_ids][:MAX_LENGTH]))
    return examples or None


SEEDS = [
    b"prompt,response\nWhat is 1?,one\nWhat is 2?,two\n",
    b'prompt,response\r\n"a ""quoted"" word","two\r\nlines"\r\n\r\n"x, y",z\r\n',
    b'\xef\xbb\xbfid,prompt,response\n1,"na\xc3\xafve","\xe6\xbc\xa2\xe5\xad\x97"\n2,NA,18\n3,,\n',
    b'response,other,prompt\nb,"",a\n" ",c,d\n' + b"long answer " * 5 + b",x,y\n",
    b"prompt,response\n\x1b[2Jred,</s><s>\n" + b"p" * 47 + b",no room\n" + b"p" * 46 + b",cut\n",
]
PIECES = [
    b'"',
    b'""',
    b",",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xef\xbb\xbf",
    b"\x1b]0;title\x07",
]
PIECES += [
    "\u2028".encode(),
    "\x85".encode(),
    "\u202e".encode(),
    b" ",
    b"\t",
    b"prompt",
    b"response",
    b"<pad>",
    b"\\",
    b"'",
]


def mutated(dice: random.Random) -> bytes:
    """A valid CSV after one to three accidents."""
    content = bytearray(dice.choice(SEEDS))
    for _ in range(dice.randint(1, 3)):
        start = dice.randint(0, len(content))
        end = min(len(content), start + dice.choice([0, 1, 1, 2, 5, 20]))
        accident = dice.randrange(7)
        if accident <= 1:
            content[start:end] = dice.choice(PIECES)
        elif accident == 2:
            del content[start:end]
        elif accident == 3:
            content[start:start] = content[start:end] * dice.randint(1, 3)
        elif accident == 4 and end > start:
            content[start] ^= 1 << dice.randrange(8)
        elif accident == 5:
            other = dice.choice(SEEDS)
            content[start:] = other[dice.randint(0, len(other)) :]
        elif accident == 6 and dice.random() < 0.2:
            del content[start:]
    return bytes(content)


def test_the_expectation_sees_a_wrong_row():
    assert expected(b'prompt,response\na,b\n\n"c\nd",e\n') == [
        (2, [BOS, *b"a", *b"b", EOS]),
        (4, [BOS, *b"c\nd", *b"e", EOS]),
    ]
    for refused in (
        b"",
        b"prompt\na\n",
        b"prompt,response\na\n",
        b"prompt,response\n,\n",
        b"prompt,response\n\xff,b\n",
    ):
        assert expected(refused) is None


@pytest.mark.slow
def test_mutated_files_give_the_right_rows_or_one_message(tmp_path, capsys, monkeypatch):
    # thousands of pools of processes would take minutes
    monkeypatch.setattr(token_cache, "map_ahead", lambda function, batches, **_: map(function, batches))
    dice, tokenizer = random.Random(SEED), character_tokenizer()
    path, cache_dir = tmp_path / "data.csv", tmp_path / "cache"
    training_args = TrainingArguments(output_dir=str(tmp_path / "out"), model_max_length=MAX_LENGTH, use_cpu=True)
    data_args = DataArguments(data_path=str(path), data_cache_dir=str(cache_dir))
    accepted = refused = 0
    slowest_s = 0.0
    for index in range(INPUTS):
        content = mutated(dice)
        path.write_bytes(content)
        wanted, began = expected(content), time.monotonic()
        try:
            problems = checks.data_problems(data_args)
            found = None
            if not problems:
                dataset = utils.make_supervised_data_module(tokenizer, data_args, training_args)["train_dataset"]
                found = [(int(dataset.row_numbers[i]), dataset[i]["input_ids"].tolist()) for i in range(len(dataset))]
        except UserError as error:
            problems, found = error.problems, None
        slowest_s = max(slowest_s, time.monotonic() - began)
        assert found == wanted, f"input {index}: {content!r}\n{problems}"
        for problem in problems:
            assert str(path) in problem and problem.isprintable(), f"input {index}: {content!r}\n{problem!r}"
        accepted += found is not None
        refused += found is None
        shutil.rmtree(cache_dir, ignore_errors=True)
    printed = capsys.readouterr()
    assert not set("\x1b\x07\x85\u202e\u2028") & set(printed.out)  # no cell steers a terminal
    assert "Traceback" not in printed.err
    print(f"{accepted} files read, {refused} refused, the slowest in {slowest_s:.2f} s")
    assert accepted > INPUTS / 5 and refused > INPUTS / 5
    assert slowest_s < 5
