"""A figure counts only if what was timed was right in the same run: the checks that benchmarks call."""

from __future__ import annotations

import torch
from torch import Tensor


class WrongResult(RuntimeError):
    """What was to be timed gives a wrong result; its figure must not appear."""


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; NaN where `out` holds NaN."""
    expected = expected.double()
    return ((out.double() - expected).norm() / expected.norm()).item()


def require_close(what: str, out: Tensor, expected: Tensor, tolerance: float) -> float:
    """The relative error of `out`. Raises WrongResult where it is above `tolerance`, or the shapes differ."""
    if out.shape != expected.shape:
        raise WrongResult(f"{what}: shape {list(out.shape)}, expected {list(expected.shape)}")
    error = relative_error(out, expected)
    if not error <= tolerance:  # NaN fails too
        raise WrongResult(f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}")
    return error


def require_equal(what: str, out: Tensor, expected: Tensor) -> None:
    """Raises WrongResult where two tensors differ in a single element."""
    if out.shape != expected.shape or not torch.equal(out, expected):
        count = int((out != expected).sum()) if out.shape == expected.shape else out.numel()
        raise WrongResult(f"{what}: {count} of {out.numel()} elements differ")
