"""Triton kernels without a GPU: Triton decides at its import whether to interpret, so a test file runs itself in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def run_interpreted(file: str) -> str:
    """Run a test file as a script with Triton interpreted on the CPU; what it printed."""
    pytest.importorskip("triton", minversion="3.9")  # before, its interpreter does not run beside numpy 2.4
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}",
    }
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """||a - b|| / ||b||"""
    return float((found.detach().double() - reference.detach()).norm() / reference.detach().double().norm())
