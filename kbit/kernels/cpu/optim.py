"""Optimizer step on the CPU: launcher of optim.cpp, one call for all tensors of a batch."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch

from kbit.formats.codebooks import codebook
from kbit.kernels.cpu import library
from kbit.kernels.cpu.library import DTYPES

# int64 columns of a table row: p, g, 3 states, 3 absmax, count, scalars row, step, compensation, seed, 3 for GPUs
COLUMNS = 16
SCALARS = 16
# Bins of float bit patterns, 128 to a power of two. The offset keeps every midpoint away from the edges of bins.
_BIN_OFFSET, _BIN_FIRST, _BINS = 0x5A5B, 13350, 2907


class _Map(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "midpoints", "rank", "lines", "steps")]


_NUMBERS = (
    "algorithm",
    "flags",
    "decay_in_direction",
    "norm",
    "bits8",
    "skip_zeros",
    "p_dtype",
    "g_dtype",
    "stochastic",
    "kahan",
    "threads",
    "bin_offset",
    "bin_first",
    "bins",
)


class _Settings(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int32) for name in _NUMBERS), ("maps", _Map * 2)]


def available() -> bool:
    """Whether the compiled step can be used on this machine (compiles it on the first question)."""
    return library.available()


_STEP = (ctypes.POINTER(_Settings), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)


@functools.cache
def _tables(signed: bool) -> tuple[np.ndarray, ...]:
    """The arrays of struct Map for a dynamic map: values fp32 [256], midpoints fp32 [256] (the last infinite), rank
    uint8 [2 * bins], lines fp32 [3, 16] and steps fp32 [256]."""
    name = "dynamic8" if signed else "dynamic8-unsigned"
    midpoints = codebook(name, "cpu", "midpoints")
    # The smallest magnitude of each bin; the rank of a bin counts the midpoints below everything in it.
    edges = ((np.arange(_BINS, dtype=np.int64) + _BIN_FIRST << 16) - _BIN_OFFSET).astype(np.int32).view(np.float32)
    edges[0] = 0.0
    below = torch.bucketize(torch.from_numpy(edges), midpoints)
    upper = np.append(edges[1:], np.float32(np.inf))
    mirrored = torch.bucketize(torch.from_numpy(-upper), midpoints)
    rank = torch.cat([below, mirrored]).to(torch.uint8).numpy()
    values = codebook(name).numpy()
    # A decade holds `count` magnitudes, linear: rank of a = a * slope + offset, kept below the decade's last rank.
    count, low = 2.0 ** np.arange(16) * (1 if signed else 2), 1 if signed else 2
    lines = np.stack([10.0 ** (6 - np.arange(16)) / 0.9 * count, count * (8 / 9) - low, count * 2 - low])
    magnitudes = values[values >= 0]
    steps = np.full(256, np.inf, dtype=np.float32)
    steps[: len(magnitudes) - 1] = (magnitudes[:-1] + magnitudes[1:]) / np.float32(2)
    bounded = np.append(midpoints.numpy(), np.float32(np.inf)).astype(np.float32)
    return values, bounded, rank, lines.astype(np.float32), steps


def _settings(**numbers: int) -> _Settings:
    settings = _Settings(bin_offset=_BIN_OFFSET, bin_first=_BIN_FIRST, bins=_BINS, **numbers)
    for index, signed in enumerate((False, True)):
        settings.maps[index] = _Map(*(array.ctypes.data for array in _tables(signed)))
    return settings


def step(
    table: np.ndarray,
    scalars: np.ndarray,
    *,
    algorithm: int,
    flags: int,
    decay_in_direction: bool,
    norm: int,
    bits8: bool,
    skip_zeros: bool,
    p_dtype: torch.dtype,
    g_dtype: torch.dtype,
    stochastic: bool,
    kahan: bool,
) -> None:
    """Advance every tensor of a batch by one step, in place.

    table: int64 [tensors, 16], addresses of contiguous tensors that the caller keeps alive. scalars: fp32 [rows, 16].
    Raises RuntimeError when memory for norms runs out, or where there is no native library.
    """
    settings = _settings(
        algorithm=algorithm,
        flags=flags,
        decay_in_direction=decay_in_direction,
        norm=norm,
        bits8=bits8,
        skip_zeros=skip_zeros,
        p_dtype=DTYPES[p_dtype],
        g_dtype=DTYPES[g_dtype],
        stochastic=stochastic,
        kahan=kahan,
        threads=torch.get_num_threads(),
    )
    call = library.function("kbit_optim_step", _STEP, ctypes.c_int32)
    if call(ctypes.byref(settings), table.ctypes.data, len(table), scalars.ctypes.data):
        raise RuntimeError("the optimizer step ran out of memory")
