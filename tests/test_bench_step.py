"""The benchmark of the training step runs as its users run it, here on a CPU."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_benchmark_measures_both_ways_on_the_lengths_of_a_csv(tiny_llama, questions_csv, tmp_path):
    output = tmp_path / "results.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_step.py"), "--scenarios", "cpu", "--repeat", "1"]
    command += ["--data_path", str(questions_csv), "--tokenizer", str(tiny_llama), "--output", str(output)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout
    assert "examples see each other, bf16 against padded float32" in ended.stdout
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["variant"] for result in results] == ["ancestor", "ours", "ours_unshared"]
    ancestor, ours, unshared = results
    assert (
        ancestor["tokens_per_step"] == ours["tokens_per_step"] == unshared["tokens_per_step"]
    )  # the same examples in each step
    assert ours["padding_share"] == 0 < ancestor["padding_share"]
    assert ours["shared_share"] >= 0 == unshared["shared_share"] == ancestor["shared_share"]
    assert ours["ratio_to_ancestor"] == ours["tokens_per_s"] / ancestor["tokens_per_s"]
    for result in results:
        assert result["tokens_per_s"] * result["step_s"] == pytest.approx(result["tokens_per_step"])
        assert result["tokens_per_s"] > result["trained_tokens_per_s"] > 0
