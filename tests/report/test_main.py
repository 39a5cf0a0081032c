"""`python -m sft.report`: runs beside each other, and what the fields of a record mean."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
from records import FIELDS

from sft.job import UserError
from sft.report import __main__


def test_padded_and_packed_lie_on_each_other(watched, watched_padded, tmp_path, capsys):
    __main__.main([str(watched_padded.folder), str(watched.folder), "--output", str(tmp_path / "both.png")])
    printed = capsys.readouterr().out
    assert printed.startswith("| | padded | packed |\n|---|---:|---:|\n| status | finished | finished |\n")
    difference = re.search(r"padded and packed: 8 steps in both logs, losses differ by at most (\S+) \(step", printed)
    assert float(difference[1]) < 1e-5
    assert printed.endswith(f"picture: {tmp_path / 'both.png'}\n")
    assert (tmp_path / "both.png").stat().st_size > 10_000
    losses = [entry["loss"] for entry in watched.record["log"]]
    assert max(losses) - min(losses) > 0.1  # equal curves that do not move would say little


def test_runs_that_differ_are_told_apart(watched):
    other = copy.deepcopy(watched.record)
    other["log"][5]["loss"] += 0.5
    text = __main__.comparison({"a": watched.record, "b": other})
    assert text.endswith("a and b: 8 steps in both logs, losses differ by at most 5.00e-01 (step 6)")


def test_two_folders_of_one_name_are_told_apart(watched, tmp_path):
    for parent in ("first", "second"):
        (tmp_path / parent / "out").mkdir(parents=True)
        shutil.copy(watched.folder / "run_report.json", tmp_path / parent / "out")
    both = [str(tmp_path / parent / "out") for parent in ("first", "second")]
    assert list(__main__.load_runs(both)) == both
    assert list(__main__.load_runs(both[:1])) == ["out"]


def test_reports_that_cannot_be_compared(watched, tmp_path, monkeypatch):
    """Every folder's problem in one message: a run that logged no step, no run at all, something else, another format."""
    monkeypatch.chdir(tmp_path)
    contents = {"begun": watched.record | {"status": "unfinished", "log": []}, "list": [1], "later": {"format": 2}}
    for name, content in contents.items():
        Path(name).mkdir()
        Path(name, "run_report.json").write_text(json.dumps(content))
    Path("torn").mkdir()
    Path("torn", "run_report.json").write_text('{"format": 1,')
    with pytest.raises(UserError) as error:
        __main__.load_runs(["begun", "nowhere", "list", "later", "torn", str(watched.folder)])
    begun, nowhere, other, later, torn = error.value.problems
    assert begun == "begun/run_report.json: the run is unfinished and logged no step: there is nothing to draw."
    assert nowhere == "nowhere: there is no run_report.json in it. Give the --output_dir of a run that trained."
    assert other == "list/run_report.json: not a report of a run (it holds a list, not an object)."
    assert later == "later/run_report.json: not a report that this version reads (format 1)."
    assert torn.startswith("torn/run_report.json: not a report of a run (")


def test_an_unfinished_run_is_drawn_and_named_so(watched, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    begun = watched.record | {"status": "unfinished", "log": watched.record["log"][:3], "final": {}}
    (tmp_path / "begun" / "run_report.json").write_text(json.dumps(begun))
    __main__.main([str(tmp_path / "begun"), str(watched.folder), "--output", str(tmp_path / "both.png")])
    assert "| status | unfinished | finished |" in capsys.readouterr().out


def test_the_fields_are_printed_with_their_meaning(capsys):
    __main__.main(["--fields"])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert (head, rule) == ("| field | meaning |", "|---|---|")
    assert [re.fullmatch(r"\| `(\S+)` \| [^|]+ \|", row)[1] for row in rows] == FIELDS
    assert "| `log[].learning_rate` | of the last step |" in rows
