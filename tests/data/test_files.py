"""Files of other kinds than CSV, several of them, and what is said of a file that is not what its name says."""

import gzip
import io
import json
import zipfile
from decimal import Decimal

import pytest
from characters import BOS, EOS, character_tokenizer

import utils
from sft.data import checks, files
from sft.data.files import DataFile, read_rows
from sft.data.template import load_template
from sft.flags import DataArguments, TrainingArguments
from sft.job import UserError

PAIR = {"prompt": "--source", "response": "--target"}
ROWS = [('a "b",\r\n', "é"), ("", "x"), (" 18", "nan"), ("日本\u2028", "🙂")]
RECORDS = [{"prompt": prompt, "response": response} for prompt, response in ROWS]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def table(tmp_path, records, name="data.parquet") -> str:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name)
    return str(tmp_path / name)


def lines(*records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def problems_of(function, *args, **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return caught.value.problems


def faults(path, **how) -> list[str]:
    return [line.removeprefix(path) for line in problems_of(lambda: list(read_rows(path, PAIR, **how)))]


def test_every_kind_of_file_gives_the_same_cells(write, tmp_path):
    expected = list(enumerate(ROWS, 1))
    for path in (
        write("a.json", json.dumps(RECORDS, indent=1)),
        write("b.json", "\ufeff\n" + json.dumps(RECORDS, ensure_ascii=False)),
        write("lines.json", lines(*RECORDS)),
        write("a.JSONL", "\ufeff" + lines(*RECORDS)),
        table(tmp_path, RECORDS),
    ):
        assert list(read_rows(path, PAIR)) == expected, path
    tsv = 'prompt\tresponse\n"a ""b"",\r\n"\té\n\tx\n 18\tnan\n日本\u2028\t🙂\n'
    assert list(read_rows(write("a.tsv", tsv), PAIR)) == [(number + 1, cells) for number, cells in expected]


def test_an_empty_absent_or_null_cell_is_empty_and_a_blank_line_is_a_row(write, tmp_path):
    records = [{"prompt": "a", "response": None}, {"prompt": "b", "response": "c"}, {"response": "d", "other": 5}]
    empty = [(1, ("a", "")), (2, ("b", "c")), (3, ("", "d"))]
    assert list(read_rows(write("a.jsonl", lines(*records)), PAIR)) == empty
    assert list(read_rows(table(tmp_path, records), PAIR)) == empty
    path = write("b.jsonl", lines(records[1]) + "\n" + lines(records[1]))
    assert list(read_rows(path, PAIR)) == [(1, ("b", "c")), (2, ("", "")), (3, ("b", "c"))]
    assert list(read_rows(path, PAIR | {"more": None})) == [(1, ("b", "c", "")), (2, ("", "", "")), (3, ("b", "c", ""))]


def test_numbers_are_refused_or_taken_as_they_are_written(write, tmp_path):
    path = write(
        "a.jsonl",
        '{"prompt": 1.50, "response": "a"}\n{"prompt": "b", "response": true}\n{"prompt": 1e400, "response": 12345678901234567890123}\n',
    )
    cure = "not text. Write it as text, or add --allow_numbers True."
    assert faults(path) == [
        f", row 1, column 'prompt': the number 1.5, {cure}",
        f", row 2, column 'response': true, {cure}",
        f", row 3, column 'prompt': the number inf, {cure}",
        f", row 3, column 'response': the number 12345678901234567890123, {cure}",
    ]
    assert list(read_rows(path, PAIR, allow_numbers=True)) == [
        (1, ("1.50", "a")),
        (2, ("b", "true")),
        (3, ("1e400", "12345678901234567890123")),
    ]
    import datetime

    path = table(tmp_path, [{"prompt": Decimal("1.50"), "response": datetime.date(2026, 11, 30)}])
    assert faults(path, allow_numbers=True) == [", row 1, column 'response': a date, not text. Write it as text."]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a", "response" "b"}\n',
         [", line 2, column 28: not JSON: Expecting ':' delimiter."]),
        ("a.json", '[{"prompt": "a", "response": "b"},\n {"prompt": "a" "response": "b"}]', [", line 2, column 17: not JSON: Expecting ',' delimiter."]),
        ("a.jsonl", "[" * 100_000 + "\n", [", line 1: not JSON that can be read: nested too deeply, or a number too long."]),
        ("a.jsonl", '{"prompt": "a", "prompt": "b", "response": "c"}\n', [", row 1: the key 'prompt' stands in it twice. Remove one."]),
        ("a.json", '[{"prompt": "a", "response": "b"},\n {"prompt": "a", "response": "b", "response": "c"}]',
         [", row 2: the key 'response' stands in it twice. Remove one."]),
        ("a.json", '[{"prompt": "a", "response": "b"}, 5]', [", row 2: a int, not an object with named columns."]),
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff"}\n', [", line 2: byte 0xff is not UTF-8. Save the file as UTF-8."]),
        ("a.jsonl", '{"prompt": "a", "respond": "b"}\n', [": no column 'response'. Its columns are 'prompt', 'respond'. Name the right one with --target."]),
        ("a.jsonl", '{"prompt": "\\ud83d", "response": "b"}\n', [", row 1, column 'prompt': character 1 is half of a pair (\\ud83d). Write the whole character."]),
        ("a.jsonl", '{"prompt": [{"role": "user"}], "response": "b"}\n', [", row 1, column 'prompt': a list, not text. A conversation is read with --messages prompt."]),
        ("a.jsonl", "", [": no rows in it. Add the training examples."]),
        ("a.json", "[]", [": no rows in it. Add the training examples."]),
        ("a.csv.gz", gzip.compress(b"prompt,response\n", mtime=0), [": a compressed file. Unpack it first."]),
        ("a.csv", "prompt,response\na,b\n".encode("utf-16-le"), [": text in UTF-16. Save it as UTF-8: iconv -f UTF-16 -t UTF-8."]),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
         [": a Git LFS pointer in the place of the file. Fetch the file itself: git lfs pull."]),
        ("a.csv", b"PAR1....", [": a parquet file. Name it .parquet."]),
        ("a.parquet", b"prompt,response\n", [": not a parquet file."]),
        ("a.csv", '[\n {"prompt": "a"}]', [": JSON, not CSV. Name it .json (a list) or .jsonl (one object in each line)."]),
        ("a.csv", "<!DOCTYPE html><html>", [": a web page. Download the file itself (on the hub: the link `download`)."]),
        ("a.csv", "prompt\tresponse\na\tb\n", [": its columns are separated by tabs ('\\t'). Name it .tsv."]),
        ("a.tsv", "prompt,response\na,b\n", [": its columns are separated by commas (','). Name it .csv."]),
        ("a.tsv", 'prompt\tresponse\n"a"b\tc\n', [", row 2: text after a closing quote. A quote inside a cell is written twice."]),
    ],
)  # fmt: skip
def test_each_fault_is_one_message(write, name, content, said):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    assert faults(write(name, content)) == said


def test_a_list_that_is_none_and_a_parquet_file_that_is_cut(write):
    assert (
        "(a .json file holds a list of objects, or one object in each line)."
        in faults(write("a.json", '{\n"prompt": "a"}'))[0]
    )
    pytest.importorskip("pyarrow")
    assert faults(write("a.parquet", b"PAR1...."))[0].startswith(": a damaged parquet file (")


def test_spreadsheets_and_archives(write):
    for inside, said in (
        ("xl/workbook.xml", "a spreadsheet (Excel). Save it as CSV UTF-8."),
        ("a.csv", "a zip archive. Unpack it first."),
    ):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(inside, "prompt,response\n")
        assert faults(write("a.csv", archive.getvalue())) == [f": {said}"]


def test_a_parquet_without_the_column_or_without_its_reader(tmp_path, monkeypatch):
    path = table(tmp_path, [{"prompt": "a", "answer": "b"}])
    missing = ": no column 'response'. Its columns are 'prompt', 'answer'. Name the right one with --target."
    assert faults(path) == [missing]
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert faults(path) == [": a parquet file needs pyarrow: pip install pyarrow"]


# ------------------------------------------------------------------------------------------------------ several files


@pytest.fixture
def make(tmp_path):
    def make(*paths, max_length=64, **flags):
        flags = {"data_cache_dir": str(tmp_path / "cache")} | flags
        args = TrainingArguments(output_dir=str(tmp_path / "out"), model_max_length=max_length, use_cpu=True)
        return utils.make_supervised_data_module(
            character_tokenizer(), DataArguments(data_path=[*paths], **flags), args
        )

    return make


def test_repeats_and_shares_are_taken_counted_and_named(write, make, capsys):
    one = write("one.csv", "prompt,response\n" + "".join(f"a{n},b\n" for n in range(4)))
    two = write("two.jsonl", lines(*({"prompt": f"c{n}", "response": "d"} for n in range(10))))
    dataset = make(f"{one}*3", f"{two}*0.5")["train_dataset"]
    assert [dataset.where(index) for index in range(12)] == [f"{one}, row {row}" for row in (2, 3, 4, 5)] * 3
    taken = [dataset.where(index) for index in range(12, 17)]
    assert taken == [f"{two}, row {row}" for row in (3, 4, 5, 7, 8)]  # the same in every run
    assert dataset[12]["input_ids"].tolist() == [BOS, ord("c"), ord("2"), ord("d"), EOS]
    assert len(dataset) == 17 and dataset.counts["rows_read"] == 14 and dataset.counts["tokens"] == 17 * 5
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{one}: 4 rows read, ") and printed[0].endswith("; each is taken 3 times")
    assert printed[1].startswith(f"{two}: 10 rows read, ") and printed[1].endswith("; 5 of them are taken (*0.5)")
    assert printed[2].startswith("training: 17 examples, 85 tokens, ")
    assert make(one, two)["train_dataset"].counts["kept"] == 14


def test_held_out_rows_are_not_among_the_repeats_of_any_file(write, make):
    one = write("one.csv", "prompt,response\n" + "".join(f"p{n},b\n" for n in range(20)))
    two = write("two.csv", "prompt,response\n" + "".join(f"p{n},c\n" for n in range(30)))
    module = make(f"{one}*2", two, eval_split=0.2)
    train, held_out = (
        {tuple(ids["input_ids"].tolist()[:-2]) for ids in module[name]} for name in ("train_dataset", "eval_dataset")
    )
    assert not train & held_out and len(module["eval_dataset"]) <= 10 < len(module["train_dataset"])
    assert len(train | held_out) == 30 and len(module["train_dataset"]) + len(module["eval_dataset"]) > 50


def test_a_share_that_cannot_be_taken(write, make, tmp_path):
    path = write("one.csv", "prompt,response\na,b\nc,d\n")
    assert make(path + "*3")["train_dataset"].counts["kept"] == 6
    cure = "Give a whole number of repeats (FILE*3) or a share below 1 (FILE*0.5)."
    problems = checks.data_problems(DataArguments(data_path=[f"{path}*1.5", f"{path}*0", f"{tmp_path}/no.csv*2"]))
    assert problems == [
        f"{path}*1.5: its rows cannot be taken 1.5 times. {cure}",
        f"{path}*0: its rows cannot be taken 0 times. {cure}",
        f"{tmp_path}/no.csv: No such file or directory. Give a file that can be read.",
    ]
    (problem,) = problems_of(make, path + "*0.1")
    assert problem.endswith("Nothing is left to train on: *0.1 of 2 rows is none: take a larger share.")
    assert DataFile.of(write("odd*2", "")) == DataFile(str(tmp_path / "odd*2"), 1)


def test_files_with_different_columns_are_said_together(write):
    paths = [
        write("one.csv", "prompt,response\na,b\n"),
        write("two.csv", "question,answer\na,b\n"),
        write("three.jsonl", lines({"prompt": "a"})),
    ]
    problems = checks.data_problems(DataArguments(data_path=paths))
    assert [line.split(" Its")[0] for line in problems] == [
        f"{paths[1]}: no column 'prompt'.",
        f"{paths[1]}: no column 'response'.",
        f"{paths[2]}: no column 'response'.",
    ]


def test_only_empty_responses_are_told_as_such(write, make):
    (problem,) = problems_of(make, write("one.csv", "prompt,response\na,\n"))
    assert problem.endswith(
        "Nothing is left to train on: fill in the empty prompts and responses, or name other columns."
    )


# ----------------------------------------------------------------------------------------------- columns of a template


def test_alpacas_own_file_trains_with_its_input(write, make):
    records = [
        {"instruction": "Add {input}.", "input": "1, {instruction}", "output": "2"},
        {"instruction": "Say hi.", "input": " ", "output": "hi"},
        {"instruction": " ", "input": "3", "output": "4"},
    ]
    path = write("alpaca_data.json", json.dumps(records, indent=4))
    flags = {"source": "instruction", "target": "output", "prompt_template": "alpaca"}
    dataset = make(path, max_length=512, **flags)["train_dataset"]
    texts = [character_tokenizer().decode(example["input_ids"]) for example in dataset]
    assert texts == [
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {input}.\n\n### Input:\n1, "
        "{instruction}\n\n### Response:2</s>",
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:hi</s>",
    ]
    assert dataset.counts["rows_empty"] == 1


def test_a_template_over_any_columns(write, make, tmp_path):
    template = tmp_path / "template.txt"
    template.write_text("{system}\nQ: {question} {{question}} {not a column}\nA:")
    path = write("a.csv", "question,system,response\nq{system},s,r\n,,r\n,s,r\n")
    dataset = make(path, prompt_template=str(template))["train_dataset"]
    assert [character_tokenizer().decode(example["input_ids"]) for example in dataset] == [
        "<s>s\nQ: q{system} {question} {not a column}\nA:r</s>",
        "<s>s\nQ:  {question} {not a column}\nA:r</s>",
    ]
    template.write_text("{context} {instruction}")
    assert checks.data_problems(DataArguments(data_path=path, prompt_template=str(template))) == [
        f"{path}: no column 'prompt'. Its columns are 'question', 'system', 'response'. Name the right one with --source.",
        f"{path}: no column 'context'. Its columns are 'question', 'system', 'response'. Name the right one with {{context}} in "
        f"--prompt_template {template}.",
    ]
    template.write_text("no column")
    assert problems_of(load_template, str(template)) == [
        f"--prompt_template {template}: no column stands in it. Write {{instruction}} where the source column's text belongs, or the "
        "names of other columns."
    ]


def test_prompt_and_response_in_a_chat_template(write, make, tmp_path):
    chat = tmp_path / "chat.jinja"
    chat.write_text(
        '{{ bos_token }}{% for m in messages %}<{{ m["role"] }}>{{ m["content"] }}{% if m["role"] == "assistant" %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}'
    )
    path = write("a.csv", "prompt,response\na</s>,b\n,c\n")
    (example,) = make(path, prompt_template=str(chat))["train_dataset"]
    assert character_tokenizer().decode(example["input_ids"]) == "<s><user>a</s><assistant>b</s>"
    assert example["input_ids"].tolist().count(EOS) == 1  # the cell's is text
    assert example["labels"].tolist()[-2:] == [ord("b"), EOS] and set(example["labels"].tolist()[:-2]) == {
        utils.IGNORE_INDEX
    }


def test_files_larger_than_memory_are_read_in_pieces(write, tmp_path, monkeypatch):
    records = [{"prompt": f"p{n}", "response": "r"} for n in range(2000)]
    for path in (write("a.jsonl", lines(*records)), table(tmp_path, records)):
        seen = []
        rows = read_rows(path, PAIR, True, False, seen.append)
        for _ in range(2 * files.ROWS_PER_BATCH):
            next(rows)
        assert 0 < seen[-1] < len(lines(*records)) / 2, path


def test_a_number_that_is_none_is_an_empty_cell(write):
    path = write("a.jsonl", '{"prompt": "a", "response": NaN}\n{"prompt": "b", "response": "c"}\n')
    assert [cells for _, cells in read_rows(path, PAIR)] == [("a", ""), ("b", "c")]


def test_rows_are_numbered_below_a_header_where_there_is_one():
    assert [files.first_row(f"a{end}") for end in (".csv", ".TSV", ".txt", ".jsonl", ".json", ".parquet")] == [
        2,
        2,
        2,
        1,
        1,
        1,
    ]
