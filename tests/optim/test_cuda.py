"""The CUDA step without a GPU: its encoding tables followed in numpy, and its source compiled for the host."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kbit.formats.codebooks import codebook
from kbit.kernels.cuda import optim as kernel


def encode(scaled: np.ndarray, signed: bool) -> np.ndarray:
    """Codes of values already divided by absmax: the kernel's clamp, one look-up, one addition, the sign by bytes."""
    scale, smallest = np.float32(2.0**kernel.SCALE_EXPONENT), np.finfo(np.float32).tiny
    if signed:
        small = scaled * scale  # exact, or below the smallest normal number
        small = np.where(np.abs(small) < smallest, np.copysign(np.float32(0), small), small)
        small = np.abs(np.maximum(small, np.float32(-kernel.signed_top())))
    else:  # the sum is exact in float64, or next to `smallest`, and is rounded up
        product = np.where(scaled < smallest, 0.0, scaled.astype(np.float64) * scale)
        exact = product + smallest
        small = exact.astype(np.float32)
        up = (small < exact) | ((exact == smallest) & (product > 0))
        small = np.where(up, np.nextafter(small, np.float32(1)), small)
    bits = small.astype(np.float32).view(np.uint32)
    codes = (kernel.encoding_cells(signed)[bits >> 16] + bits) >> 16 & 0xFF
    return np.where(np.signbit(scaled), 254 - codes, codes) if signed else codes


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_for_every_magnitude(signed):
    name = "dynamic8" if signed else "dynamic8-unsigned"
    midpoints = codebook(name, "cpu", "midpoints")
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(200_000, generator=generator).clamp(-1, 1), torch.logspace(-12, 0, 200_000), codebook(name)]
    values += [torch.nextafter(midpoints, midpoints + side) for side in (-1, 1)]
    values += [torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, 1.2e-38, 1e-30, 2.0**-23, -(2.0**-23)])]
    x = torch.cat(values + [-v for v in values])
    x = x if signed else x.abs()
    wanted = torch.bucketize(x, midpoints).numpy()
    if not signed:  # only 0, and what counts as 0, has its code
        wanted = np.maximum(wanted, x.numpy() >= np.finfo(np.float32).tiny)
    assert np.array_equal(encode(x.numpy(), signed), wanted)
    # Exactly between two codes: the one of smaller magnitude.
    inward = torch.where(
        midpoints < 0, torch.bucketize(midpoints, midpoints, right=True), torch.bucketize(midpoints, midpoints)
    )
    assert np.array_equal(encode(midpoints.numpy(), signed), inward.numpy() if signed else inward.clamp(min=1).numpy())


# A few rules, settings and dtypes; `python tests/optim/cuda_on_host.py` runs all of triton_checks.py.
CHOSEN = (
    "(equals_plain and 8 and (settings1- or settings4 or settings10 or settings15)) or (equals_plain and settings1-32) "
    "or (low_precision and 8) or (not_finite and 8) or unaligned or (much_larger and (AdamW or AdEMAMix))"
)


@pytest.mark.skipif(not shutil.which("g++") or platform.machine() != "x86_64", reason="needs g++ on x86-64")
def test_kernel_source_on_the_host():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("cuda_on_host.py")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), "-k", CHOSEN]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=script.parents[2])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
