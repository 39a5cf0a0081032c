"""How many questions a tuned model answers exactly, in whatever columns."""

import sys

import pytest
from scripts import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import count_exact


def test_columns_of_any_name(tmp_path, monkeypatch, capsys):
    path = tmp_path / "answers.csv"
    path.write_text("question,answer,mine\na,b,b\nc,d,e\n")
    words = [str(path), "--source", "question", "--target", "answer", "--answer_column"]
    monkeypatch.setattr(sys, "argv", ["count_exact.py", *words, "mine", "--at_least", "0.5"])
    count_exact.main()
    assert capsys.readouterr().out.splitlines() == [
        "wrong: 'c' -> 'e', the file says 'd'",
        "1 of 2 questions answered exactly (50.0%)",
    ]
    monkeypatch.setattr(sys, "argv", ["count_exact.py", *words, "theirs"])
    with pytest.raises(SystemExit, match=r"no column .theirs.. Its columns are question, answer, mine."):
        count_exact.main()
