"""Optimizer step on the CPU: launcher of optim.cpp, one call for all tensors of a batch."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from kbit.kernels.cpu import library
from kbit.kernels.cpu.dynamic import Map, dynamic_map
from kbit.kernels.cpu.library import DTYPES

# int64 columns of a table row: p, g, 3 states, 3 absmax, count, scalars row, step, compensation, seed, 3 for GPUs
COLUMNS = 16
SCALARS = 16
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
)


class _Settings(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int32) for name in _NUMBERS), ("maps", Map * 2)]


def available() -> bool:
    """Whether the compiled step can be used on this machine (compiles it on the first question)."""
    return library.available()


_STEP = (ctypes.POINTER(_Settings), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)


def _settings(**numbers: int) -> _Settings:
    settings = _Settings(**numbers)
    for index, signed in enumerate((False, True)):
        settings.maps[index] = dynamic_map(signed)
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
