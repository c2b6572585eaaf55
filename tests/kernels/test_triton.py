"""Runs the interpreted_*.py here in Triton's interpreter, which has to be chosen before triton is first imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS, STEP = (Path(__file__).with_name(f"interpreted_{name}.py") for name in ("triton", "step"))
CASES = [
    pytest.param(KERNELS, "not slow", id="kernels"),
    pytest.param(KERNELS, "slow", id="more kernels", marks=pytest.mark.slow),
    pytest.param(STEP, "not slow", id="step", marks=pytest.mark.slow),
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.parametrize(("cases", "which"), CASES)
def test_in_the_interpreter(cases, which):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cases.parents[2])
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
