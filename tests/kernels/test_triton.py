"""Every Triton kernel through Triton's interpreter on the CPU, and the same checks on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = sorted((Path(__file__).parent / "checks").glob("check_*.py"))
ROOT = Path(__file__).parents[2]


def run(path: Path, **environment: str) -> None:
    pytest.importorskip("triton", reason="Triton does not exist for this platform", exc_type=ImportError)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_interpreted(path: Path) -> None:
    run(path, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_on_the_gpu(path: Path) -> None:
    run(path, TRITON_INTERPRET="0")
