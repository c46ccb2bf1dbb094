"""Tables of the dynamic 8-bit map for `dynamic_map.h`."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch

from kbit.formats.codebooks import codebook

# Bins of float bit patterns, 128 to a power of two. The offset keeps every midpoint away from the edges of bins.
_BIN_OFFSET, _BIN_FIRST, _BINS = 0x5A5B, 13350, 2907


class Map(ctypes.Structure):
    """struct Map: addresses of the arrays of `_tables`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "midpoints", "rank", "lines", "steps")]


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


@functools.cache
def dynamic_map(signed: bool) -> Map:
    """The map as the kernels take it; its arrays live as long as the process."""
    return Map(*(array.ctypes.data for array in _tables(signed)))
