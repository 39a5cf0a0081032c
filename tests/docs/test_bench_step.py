"""The benchmark of the training step runs as its users run it, here on a CPU."""

import csv
import json

import jobs
import pytest
from scripts import ROOT

from sft.plan import settle
from sft.step.packed_rows import in_common


def test_random_rows_begin_alike_as_far_as_real_ones(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from step_variants import RandomRows, lengths_of

    prompts = ["What is 1 plus 2?", "Add 3.", "What is 1 plus 4, and then 5?"]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "response"), *((prompt, "3") for prompt in prompts)])
    lengths = lengths_of(str(tmp_path / "rows.csv"), str(tiny_llama), "prompt", "response")
    rows = RandomRows(lengths, 64, 30_000)
    by_length = {len(row["input_ids"]): row["input_ids"].numpy() for row in (rows[index] for index in range(3))}
    one, two, three = (by_length[total] for total in lengths[:, 1])
    alike = [0, in_common(one, two), in_common(two, three)]
    assert lengths[:, 2].tolist() == alike and len(set(alike)) == 3
    assert (rows[0]["labels"] != -100).sum() == rows.lengths[0] - rows.prompt_lengths[0]


def compile_nothing() -> None:
    """In the benchmark: tests/step/test_compiled_layers.py looks at what compiling changes, and it takes a minute."""
    settle.compile_layers = lambda *_, **__: None


@pytest.mark.slow
def test_the_benchmark_measures_both_ways_on_the_lengths_of_a_csv(tiny_llama, questions_csv, tmp_path):
    output = tmp_path / "results.jsonl"
    flags = ["--scenarios", "cpu", "--repeat", "1", "--output", str(output)]
    flags += ["--data_path", str(questions_csv), "--tokenizer", str(tiny_llama)]
    printed = jobs.run(flags, 1, tmp_path / "log", compile_nothing, script="benchmarks/bench_step.py")
    assert "examples see each other, bf16 against padded float32" in printed
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["variant"] for result in results] == ["ancestor", "ours", "ours_unshared"]
    ancestor, ours, unshared = results
    # the same examples in each step
    assert ancestor["tokens_per_step"] == ours["tokens_per_step"] == unshared["tokens_per_step"]
    assert ours["padding_share"] == 0 < ancestor["padding_share"]
    assert unshared["shared_share"] == ancestor["shared_share"] == 0
    assert ours["ratio_to_ancestor"] == ours["tokens_per_s"] / ancestor["tokens_per_s"]
    for result in results:
        assert result["tokens_per_s"] * result["step_s"] == pytest.approx(result["tokens_per_step"])
        assert result["tokens_per_s"] > result["trained_tokens_per_s"] > 0
