"""The data benchmark runs, and its numbers fit together."""

import json
import multiprocessing
import re

import jobs
import pytest


def fork() -> None:
    """In the benchmark: its processes need not import everything again."""
    real = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: real("fork" if method == "spawn" else method)


@pytest.mark.slow
def test_the_benchmark_prints_one_json_line(tiny_llama, questions_csv, tmp_path):
    flags = ["--data_path", str(questions_csv), "--tokenizer", str(tiny_llama), "--rows", "200", "--repeats", "1"]
    printed = jobs.run(flags, 1, tmp_path / "log", fork, script="benchmarks/bench_data.py")
    (line,) = re.findall("^{.*}$", printed, re.M)
    result = json.loads(line)
    assert result["rows"] == 200 and 2000 < result["tokens"] < 6000
    assert result["rows_per_s"] == pytest.approx(200 / result["first_start_s"], rel=0.05)
    assert result["speedup"] == pytest.approx(result["rows_per_s"] / result["ancestor_rows_per_s"], abs=1e-3)
    assert result["fraction_of_ceiling"] == pytest.approx(result["rows_per_s"] / result["ceiling_rows_per_s"], abs=1e-3)
    assert result["second_start_s"] > 0 and result["peak_rss_gib"] < 1.5
