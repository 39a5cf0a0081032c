"""A few cases of benchmarks/kills.py, which judges from outside and shares no code with what it kills."""

import shutil
import subprocess
import sys

import pytest
from scripts import ROOT


@pytest.mark.slow
def test_killed_runs_lose_nothing_to_an_eye_from_outside(tmp_path):
    own_mounts = ["unshare", "-rm"]
    allowed = shutil.which("unshare") and subprocess.run([*own_mounts, "true"], capture_output=True).returncode == 0
    command = [*own_mounts * bool(allowed), sys.executable, str(ROOT / "benchmarks" / "kills.py")]
    command += ["--kills", "4", "--faults", "2", "--scenarios", "best checkpoint", "--folder", str(tmp_path / "kills")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0 and "0 problems" in ended.stdout.splitlines()[-1], ended.stdout + ended.stderr
