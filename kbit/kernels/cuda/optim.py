"""Launcher of `optim.cu`: settings by kind of batch, lookup tables, compilation and launch on the current stream."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kbit.formats.codebooks import codebook
from kbit.kernels.cuda import compile as compiler

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Magnitudes relative to absmax are scaled so that 2**-23, below which every signed code is zero's, becomes the smallest
# normal float. Cells are the upper 16 bits of the scaled float; the last one begins at the scaled 1.
FIRST_CELL, SCALE_EXPONENT = 2.0**-23, -103
_SCALE_CELLS = -SCALE_EXPONENT << 7
CELLS = (0x3F80 - _SCALE_CELLS) + 1
_AREA_BYTES = 208
_log = logging.getLogger(__name__)


def encoding_cells(signed: bool) -> np.ndarray:
    """uint32 `[CELLS]`: added to the bits of a scaled magnitude in that cell, its code (signed: plus 127) in byte 2.

    Unsigned magnitudes and midpoints are moved up to where cells begin, and the first midpoint down to 0: anything
    above 0 has code 1 at least.
    """
    values = codebook("dynamic8" if signed else "dynamic8-unsigned")
    magnitudes = values[values >= 0]
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    if not signed:
        midpoints[0] = 0.0
        midpoints += FIRST_CELL
    bits = midpoints.view(torch.int32).numpy().astype(np.int64)
    bits -= _SCALE_CELLS << 16
    cells = np.arange(CELLS, dtype=np.int64)
    ranks = np.searchsorted(bits, cells << 16)  # midpoints below the cell
    carry = np.zeros_like(cells)
    inside = bits >> 16
    assert len(set(inside)) == len(inside) and inside.min() >= 128, "a cell holds one midpoint at most"
    carry[inside] = 0xFFFF - (bits & 0xFFFF)
    code = ranks + (127 if signed else 0)
    return (((code - cells) << 16) + carry & 0xFFFFFFFF).astype(np.uint32)


def signed_top() -> float:
    """The largest magnitude, scaled, of a negative number that is not nearer to -1, which has no code."""
    values = codebook("dynamic8")
    midpoint = (values[-2] + values[-1]) / 2
    return float(torch.nextafter(midpoint, torch.tensor(0.0))) * 2.0**SCALE_EXPONENT


@functools.cache
def lookup(device: torch.device) -> Tensor:
    """What a thread block copies into shared memory: both maps as fp32 bits, then the signed and unsigned cells."""
    maps = [codebook(name).numpy().view(np.uint32) for name in ("dynamic8", "dynamic8-unsigned")]
    whole = np.concatenate([*maps, encoding_cells(True), encoding_cells(False)])
    with torch.inference_mode(False):
        return torch.from_numpy(whole.view(np.int32)).to(device)


class _Hyper(ctypes.Structure):
    _fields_ = [("values", ctypes.c_double * 16)]


class _Arguments(ctypes.Structure):
    """The kernel's parameters, in its order."""

    _fields_ = [
        ("table", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("blocks", ctypes.c_int),
        ("lookup", ctypes.c_void_p),
        ("hyper", _Hyper),
        ("lr", ctypes.c_void_p),
        ("counted", ctypes.c_void_p),
        ("counted_rows", ctypes.c_int),
        ("tickets", ctypes.c_void_p),
    ]


def macros(
    algorithm: int, flags: int, decay: int, states: int, bits8: bool, skip_zeros: bool, stochastic: bool, kahan: bool,
    p_dtype: torch.dtype, g_dtype: torch.dtype, fast: bool, lr_kind: int,
) -> dict[str, object]:  # fmt: skip
    """Settings of the kernel, named as in its source."""
    p_kind, g_kind = _KINDS[p_dtype], _KINDS[g_dtype]
    # Shared memory has room for one thread block with tables on every supported GPU; three states need its registers.
    threads = 768 if bits8 and states <= 2 else 512
    return {
        "ALGO": algorithm,
        "FLAGS": flags,
        "DECAY": decay,
        "BITS8": int(bits8),
        "SKIP": int(skip_zeros),
        "STOCHASTIC": int(stochastic),
        "KAHAN": int(kahan),
        "P_KIND": p_kind,
        "G_KIND": g_kind,
        "WIDTH": 8 if p_kind and g_kind and bits8 else 4,
        "THREADS": threads,
        "CTAS": 1 if bits8 else 2,
        "PREFETCH": 1,
        "FAST": int(fast),
        "LR_KIND": lr_kind,
        "SCALE": f"{(2.0**SCALE_EXPONENT).hex()}f",
        "CELLS": CELLS if bits8 else 1,
        "SIGNED_TOP": f"{signed_top().hex()}f",
    }


@compiler.once
def _load(device: int, settings: tuple[tuple[str, object], ...]) -> tuple[compiler.Launcher, int, int]:
    """(launcher, warps of a thread block, most thread blocks at once) on the current device."""
    values: dict[str, Any] = dict(settings)
    properties = torch.cuda.get_device_properties(device)
    code = compiler.cubin("optim", f"sm_{properties.major}{properties.minor}", values, {})
    tables = 65536 + 8 * CELLS if values["BITS8"] else 256 + 8
    shared = tables + values["THREADS"] // 32 * _AREA_BYTES + 256
    function = compiler.load(code, "optim", shared)
    launcher = compiler.Launcher(function, _Arguments, values["THREADS"], shared, overlap=properties.major >= 9)
    return launcher, values["THREADS"] // 32, properties.multi_processor_count * values["CTAS"]


def available(device: torch.device) -> bool:
    """Whether the kernel serves this device: NVIDIA, compute capability 8.0 or later, NVRTC and driver at hand."""
    return device.type == "cuda" and torch.version.cuda is not None and _usable(device.index)


@functools.cache
def _usable(index: int) -> bool:
    if torch.cuda.get_device_properties(index).major < 8:
        return False
    try:
        compiler.nvrtc()
        compiler.driver()
    except OSError as error:
        _log.warning("the Triton optimizer step serves cuda:%d: %s", index, error)
        return False
    return True


def step(
    table: Tensor, rows: int, blocks: int, counted: Tensor | None, counted_rows: int, tickets: Tensor,
    hyper: tuple[float, ...], lr: Tensor | None, settings: tuple[tuple[str, object], ...],
) -> None:  # fmt: skip
    """One launch on the current device, which must be the tables'.

    table: int64 `[rows, 16]`, column 13 the number of a tensor's first block of 256, of `blocks` in all. counted: a
    table whose `counted_rows` step counts go up by one. tickets: int32 zero. hyper: 16 doubles. settings: `macros`,
    sorted.
    """
    if blocks >= 2**31 - 2**20:
        raise ValueError(f"{blocks * 256} elements are too many for one optimizer batch; make parameter groups smaller")
    device = table.device
    launcher, warps, most = _load(device.index, settings)
    grid = max(1, min(most, -(-blocks // warps)))
    tables = lookup(device)
    with launcher.lock:
        values = launcher.values
        values.table, values.rows, values.blocks, values.lookup = table.data_ptr(), rows, blocks, tables.data_ptr()
        values.hyper.values[:] = hyper
        values.lr = None if lr is None else lr.data_ptr()
        values.counted = None if counted is None else counted.data_ptr()
        values.counted_rows, values.tickets = counted_rows, tickets.data_ptr()
        launcher.start((grid, 1, 1), torch._C._cuda_getCurrentRawStream(device.index))
