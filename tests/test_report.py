"""What a person sees of a run: live line, record, picture, comparison, card, trackers."""

import re

from watched import SECRET, SECRET_IN_ENVIRONMENT, TEMPLATE

from sft.record import FIELDS, REMOVED

# ---------------------------------------------------------------------------------------------------- a run, watched


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
    assert record["final"]["model_flops"] == by_hand(shape, train)
    assert {"data", "load", "train", "evaluate", "save", "report"} <= set(record["durations_s"])
    assert 0 < record["final"]["train_steps_s"] < record["durations_s"]["train"]


def by_hand(shape, dataset):
    """FLOPs of one pass over the rows of conftest's LLaMA: 2 layers, 32 wide, 64 in the MLP, 4 heads of 8, 2 key heads."""
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    real, trained = int(dataset.lengths.sum()), int((dataset.lengths - dataset.prompt_lengths).sum())
    squared = int((dataset.lengths.astype(int) ** 2).sum())
    return 6 * 2 * layer * real + 6 * 32 * shape.vocab_size * trained + 6 * 2 * 32 * squared


def test_no_secret_is_written(watched):
    texts = {path: path.read_text() for path in watched.folder.rglob("*") if path.suffix in (".json", ".md", ".txt")}
    assert {path.name for path in texts} >= {"run_report.json", "README.md"}
    assert [path for path, text in texts.items() if SECRET in text or SECRET_IN_ENVIRONMENT in text] == []
    assert watched.record["flags"]["training"]["hub_token"] == REMOVED
    assert watched.record["command"].endswith("llama_training.py --hub_token (removed) --run_name 'with (removed)'")
    assert watched.record["flags"]["training"]["average_tokens_across_devices"] is True  # not taken for a token


def test_the_printed_lines(watched):
    lines = watched.printed.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 8
    assert re.fullmatch(
        r"step 1/8  loss \d\.\d{4}  lr 1\.00e-02  grad \d+\.\d\d  [\d,]+ tok/s/process \([\d,]+ trained\)  "
        r"padding \d+\.\d%  MFU peak unknown  mem \d+\.\d\d GiB  left \d+:\d\d",
        steps[0],
    ), steps[0]
    evaluations = [line for line in lines if line.startswith("evaluation at step")]
    assert [line.split(":")[0] for line in evaluations] == [f"evaluation at step {step}" for step in (0, 4, 8)]
    assert "(lowest so far)" in evaluations[1]
    assert not any("{'loss'" in line for line in lines)  # the Trainer's own printer is gone
