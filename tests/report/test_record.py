"""The record of a run."""

import json
import re
import time

import pytest
from records import FIELDS, state_with, unstarted
from watched import SECRET, SECRET_IN_ENVIRONMENT, TEMPLATE

from sft.report import record
from sft.report.progress import ReportCallback
from sft.report.record import PHASES, REMOVED
from sft.step.packed_rows import group_by_prefix


def paths(value, at=""):
    """{"a": {"b": 1}, "c": [{"d": 2}]} -> {"a.b", "c[].d"}"""
    if isinstance(value, dict) and value:
        return set().union(*(paths(item, f"{at}.{key}" if at else key) for key, item in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(paths(item, f"{at}[]") for item in value))
    return {at}


def documents(field, path):
    pattern = re.escape(field.removesuffix("?")).replace(r"\*", r"[^.]+")
    # what lies under `flags.*.*` and its like is of the user's making
    return re.fullmatch(pattern + (r"(\..*|\[\].*)?" if field.startswith(("flags", "evaluations")) else ""), path)


def test_every_field_is_documented_and_every_documented_field_is_there(watched):
    written = paths(watched.record)
    undocumented = [path for path in written if not any(documents(field, path) for field in FIELDS)]
    assert undocumented == []
    promised = [field for field in FIELDS if not field.endswith("?")]
    assert [field for field in promised if not any(documents(field, path) for path in written)] == []


def test_a_new_field_without_documentation_would_be_noticed():
    assert not any(documents(field, "log[].some_new_number") for field in FIELDS)
    assert any(documents(field, "log[].loss") for field in FIELDS)


def test_what_the_record_says_of_the_run(watched):
    record = watched.record
    assert record["status"] == "finished"
    assert record["batch"] == {
        "ranks": 1, "per_device": 2, "accumulation": 3, "examples_per_step": 6, "steps_per_epoch": 8, "steps": 8
    }  # fmt: skip
    assert [entry["step"] for entry in record["log"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [entry["step"] for entry in record["evaluations"]] == [0, 4, 8]
    assert record["template"]["text"] == TEMPLATE
    train = watched.trainer.train_dataset
    assert (record["data"]["train"]["kept"], record["data"]["eval"]["kept"]) == (48, 16)
    assert record["final"]["tokens"] == int(train.lengths.sum())
    assert record["final"]["trained_tokens"] == int((train.lengths - train.prompt_lengths).sum())
    shape = watched.trainer.model.config
    watched.trainer.sampler.set_epoch(0)
    shared = [
        n for batch in watched.trainer.sampler for n in group_by_prefix([train[index] for index in batch]).lengths
    ]
    assert record["final"]["shared_share"] == pytest.approx(sum(shared) / int(train.lengths.sum())) and sum(shared) > 0
    assert record["final"]["model_flops"] == by_hand(shape, train, shared)


def test_each_second_of_the_command_stands_in_one_phase(watched):
    durations = watched.record["durations_s"]
    assert set(durations) == {*PHASES} - {"checkpoints"} and min(durations.values()) >= 0
    steps = durations["first_step"] + durations["steps"]
    assert 0 < watched.record["final"]["train_steps_s"] < steps + durations["report"] + durations["train"]
    line = watched.printed.splitlines()[-1]
    printed = [float(number) for number in re.findall(r" ([\d.]+)", line)]
    assert line.startswith("seconds: start ") and line.endswith(" in all")
    assert sum(printed[:-1]) == pytest.approx(printed[-1], abs=0.05 * len(printed))
    assert printed[-1] == pytest.approx(watched.age, abs=0.03 * watched.seconds + 0.05)


def by_hand(shape, dataset, shared):
    """FLOPs of one pass over the rows of conftest's LLaMA: 2 layers, 32 wide, 64 in the MLP, 4 heads of 8, 2 key heads.

    Prefixes of `shared` tokens are computed in another example.
    """
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    computed = int(dataset.lengths.sum()) - sum(shared)
    trained = int((dataset.lengths - dataset.prompt_lengths).sum())
    squared = int((dataset.lengths.astype(int) ** 2).sum()) - sum(length**2 for length in shared)
    return 6 * 2 * layer * computed + 6 * 32 * shape.vocab_size * trained + 6 * 2 * 32 * squared


def test_no_secret_is_written(watched):
    texts = {path: path.read_text() for path in watched.folder.rglob("*") if path.suffix in (".json", ".md", ".txt")}
    assert {path.name for path in texts} >= {"run_report.json", "README.md"}
    assert [path for path, text in texts.items() if SECRET in text or SECRET_IN_ENVIRONMENT in text] == []
    assert watched.record["flags"]["training"]["hub_token"] == REMOVED
    assert watched.record["command"].endswith("llama_training.py --hub_token (removed) --run_name 'with (removed)'")
    assert watched.record["flags"]["training"]["average_tokens_across_devices"] is True  # not taken for a token


def test_writing_takes_under_half_a_percent_of_the_time(tmp_path, monkeypatch):
    """A disk that needs 3 s for the record, a picture that needs 2 s: both are written again only 400 times as late."""
    report_, _ = unstarted(tmp_path)
    now, written = [1000.0], []

    def slow(name, seconds):
        written.append((name, now[0]))
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(report_, "_write_record", lambda: slow("record", 3))
    monkeypatch.setattr(record, "draw", lambda runs, path: slow("picture", 2))
    report_.write()
    while now[0] < 1000 + 4000:
        now[0] += 1
        report_.write(spare=True)
    # the first of each is before the first step, the second ten seconds later measures what the next ones take
    assert written[:4] == [("record", 1000), ("picture", 1003), ("record", 1013), ("picture", 1016)]
    spent = sum({"record": 3, "picture": 2}[name] for name, _ in written[4:])
    assert 0 < spent <= 0.005 * 4000
    assert [name for name, _ in written].count("picture") > [name for name, _ in written].count("record") > 1


def test_a_resumed_run_keeps_the_samples_of_the_steps_it_stands_on(tmp_path, capsys):
    earlier = {"samples": [{"step": 4, "answer": "a"}, {"step": 8, "answer": "b"}, {"step": 12, "answer": "c"}]}
    (tmp_path / "run_report.json").write_text(json.dumps(earlier))
    report_, args = unstarted(tmp_path)
    ReportCallback(report_).on_train_begin(args, state_with(8), None)
    written = json.loads((tmp_path / "run_report.json").read_text())
    assert [sample["answer"] for sample in written["samples"]] == ["a", "b"]
    assert [entry["step"] for entry in written["log"]] == list(range(1, 9))
    assert written["status"] == "unfinished"
    (tmp_path / "run_report.json").write_text("")  # the disk was full
    report_, args = unstarted(tmp_path)
    ReportCallback(report_).on_train_begin(args, state_with(8), None)
    assert capsys.readouterr().out.startswith(f"warning: {tmp_path / 'run_report.json'} cannot be read")


def test_a_short_value_is_no_secret():
    told = {"api_key": "12345678", "other_key": "1234567", "token": None, "tokenizer": "a long and public name"}
    assert record._secrets(told, {"PASSWD": "of the machine"}) == {"12345678", "of the machine"}


def test_a_password_in_an_address_and_numbers_that_json_has_not():
    told = {"url": "http://me:pass@proxy:80/x and git@host", "loss": float("nan"), "tags": {"b"}, "api_key": "short"}
    assert record._clean(told, {"hf_SECRET"}) == {
        "url": f"http://{REMOVED}@proxy:80/x and git@host", "loss": None, "tags": ["b"], "api_key": REMOVED
    }  # fmt: skip
