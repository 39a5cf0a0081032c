"""The benchmark of the whole command runs as its users run it, here on a CPU and without TRL."""

import json
import os
import subprocess
import sys

import pytest
from scripts import ROOT


@pytest.mark.slow
def test_each_second_from_enter_to_the_model_has_a_phase(tiny_llama, questions_csv, tmp_path):
    command = [sys.executable, "benchmarks/bench_command.py", "--data_path", questions_csv, "--tokenizer", tiny_llama]
    command += [
        "--scenarios",
        "tiny",
        "--variants",
        "ours",
        "--rows",
        "16",
        "--states",
        "cold",
        "--work_dir",
        tmp_path / "new",
    ]
    done = subprocess.run(
        list(map(str, [*command, "--output", tmp_path / "lines"])),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (tmp_path / "lines").read_text().splitlines()
    found = json.loads(line)
    assert (found["steps"], found["rows"], found["state"]) == (4, 16, "cold") and found["tokens_per_s"] > 0
    # what no phase has is the interpreter's end
    assert found["seconds"] == pytest.approx(sum(found["phases"].values()) + found["in_no_phase_s"])
    assert {"start", "data", "plan", "load", "first_step", "steps", "save", "proof"} <= found["phases"].keys()
