"""The dataset that the original names, from the hub and from files of its forms."""

import csv
import json
import subprocess
import sys

import pytest
from scripts import ROOT, without_noise

sys.path.insert(0, str(ROOT / "examples"))
import open_instruct

from sft.data.csv_rows import read_csv

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
RECORDS = [  # of the hub's form
    {"alpaca_prompt": "### A,\n### Response:", "instruction": "A,", "response": 'says "1"\r\n', "source": "x"},
    {"alpaca_prompt": "é{input}", "instruction": "B", "response": None, "source": "y"},
]
ROWS = [(2, "### A,\n### Response:", 'says "1"\r\n'), (3, "é{input}", "")]
ALPACA_RECORDS = [
    {"instruction": "Add {input}.", "input": "1, {instruction}", "output": "2"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
    {"instruction": " ", "input": "3", "output": "4"},
]


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Convert a source as the command does; the rows that training reads then."""

    def convert(source):
        monkeypatch.setattr(sys, "argv", ["open_instruct.py", str(source), "--output", str(tmp_path / "out.csv")])
        open_instruct.main()
        return list(read_csv(str(tmp_path / "out.csv"), "prompt", "response"))

    return convert


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "lines.json", "a.parquet"])
def test_each_form_of_file_gives_the_same_rows(convert, tmp_path, name, capsys):
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif name == "a.json":
        path.write_text(json.dumps(RECORDS, indent=1))
    else:
        path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n", "utf-8")
    assert convert(path) == ROWS
    assert capsys.readouterr().out == f"{tmp_path}/out.csv: 2 rows of {path}\n"


def test_alpacas_form_is_put_into_alpacas_prompt(convert, tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(ALPACA_RECORDS))
    assert convert(path) == [
        (
            2,
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
            "response that appropriately completes the request.\n\n### Instruction:\nAdd {input}.\n\n### Input:\n1, "
            "{instruction}\n\n### Response:",
            "2",
        ),
        (3, f"{ALPACA}\n\n### Instruction:\nSay hi.\n\n### Response:", "hi"),
        (4, "", "4"),  # no instruction: training drops and counts it
    ]


def test_from_the_hub(convert, tmp_path, monkeypatch):
    import huggingface_hub

    for number, record in enumerate(RECORDS):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(record))
    asked = []

    def list_repo_files(self, repo_id, *, repo_type):
        asked.append((repo_id, repo_type))
        return ["README.md", "part-1.jsonl", "part-0.jsonl"]

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, repo_type: str(tmp_path / name))
    assert convert(open_instruct.REPOSITORY) == ROWS
    assert asked == [("VMware/open-instruct-v1-oasst-dolly-hhrlhf", "dataset")]

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **kwargs: ["README.md"])
    assert refusal(convert, "some/repository") == (
        "error: some/repository: no file ending in .parquet, .json, .jsonl there."
    )

    def no_network(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", no_network)
    assert refusal(convert, "some/repository") == (
        "error: some/repository: the hub does not give it (ConnectionError). On a machine without a network, copy the "
        "dataset's files here and name one."
    )


def refusal(convert, source) -> str:
    with pytest.raises(SystemExit) as caught:
        convert(source)
    return caught.value.code


def test_what_it_refuses_leaves_the_old_csv(convert, tmp_path):
    (tmp_path / "out.csv").write_text("old")
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"question": "c", "output": "d"}\n')
    assert refusal(convert, path) == (
        f"error: {path}, row 2: its columns are question, output. Needed are one of prompt, alpaca_prompt, instruction and "
        "one of response, output."
    )
    path.write_text('{"instruction": "a"')
    assert refusal(convert, path).startswith(f"error: {path}: not JSON: ")
    assert refusal(convert, tmp_path / "no.json") == f"error: {tmp_path}/no.json: no such file."
    assert (tmp_path / "out.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.csv"]


@pytest.mark.slow
def test_the_command(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA_RECORDS))
    command = [sys.executable, str(ROOT / "examples" / "open_instruct.py"), "alpaca.json"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, without_noise(ended.stderr)) == (
        0,
        "open_instruct_v1.csv: 3 rows of alpaca.json\n",
        "",
    )
    with open(tmp_path / "open_instruct_v1.csv", newline="", encoding="utf-8") as file:
        assert [row[1] for row in csv.reader(file)] == ["response", "2", "hi", "4"]
