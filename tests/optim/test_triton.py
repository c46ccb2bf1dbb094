"""The Triton step against plain torch.

Without a GPU it runs in Triton's interpreter, which must be chosen before triton is imported: so this file starts the
checks in triton_checks.py in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def test_triton_step_in_its_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    checks = Path(__file__).with_name("triton_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(checks)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=checks.parents[2])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["triton", "auto"])
def test_step_on_the_gpu(step):
    """`auto` is the CUDA kernel, but for norms."""
    assert torch.cuda.is_available()
    checks = Path(__file__).with_name("triton_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(checks)]
    env = {**os.environ, "KBIT_CHECKED_STEP": step}
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=checks.parents[2])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
