"""What the launchers of `linear_wide.cu` share: its parameters, and a launch with the memory that it needs."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import stream_k
from kbit.kernels.cuda.operands import TensorMap
from kbit.kernels.cuda.stream_k import Schedule

_THREADS = 384


class _Arguments(ctypes.Structure):
    """The kernel's parameters, in its order."""

    _fields_ = [
        ("map_w", TensorMap),
        ("map_x", TensorMap),
        ("absmax", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("launch", ctypes.c_uint64),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("block_shift", ctypes.c_int),
        ("shared_tiles", ctypes.c_int),
    ]


_POINTERS_AND_SIZES = struct.Struct("PPPPPPPQiiiii")  # _Arguments from absmax on
_FIRST_POINTER: int = _Arguments.absmax.offset


def load(macros: Mapping[str, object], headers: Mapping[str, str], shared_bytes: int) -> compiler.Launcher:
    """The kernel, compiled with these settings, on the current device."""
    code = compiler.cubin("linear_wide", "sm_90a", macros, headers)
    function = compiler.load(code, "linear_wide", shared_bytes)
    return compiler.Launcher(function, _Arguments, _THREADS, shared_bytes)


def launch(
    launcher: compiler.Launcher,
    cut: Schedule,
    nt: int,
    map_w: TensorMap,
    map_x: TensorMap,
    scales: tuple[Tensor, Tensor | None, Tensor | None],
    bias: Tensor | None,
    out: Tensor,
    sizes: tuple[int, int, int],
    block_size: int = 1,
) -> None:
    """Start the kernel on out's device, the current one. scales: absmax, and with double quantization those of nested
    blocks and the offset; sizes: M, N, K; nt: tokens a tile; block_size: weights a scale, of 4 bits."""
    size, flags = cut.workspace(nt)
    workspace = out.new_empty(size, dtype=torch.uint8) if size else None
    at = 0 if workspace is None else workspace.data_ptr()
    absmax, nested_absmax, nested_offset = scales
    values = (
        absmax.data_ptr(),
        0 if nested_absmax is None else nested_absmax.data_ptr(),
        0 if nested_offset is None else nested_offset.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        at,
        at + flags,
        next(stream_k.launches),
        *sizes,
        block_size.bit_length() - 1,
        cut.shared_tiles,
    )
    stream = torch._C._cuda_getCurrentRawStream(out.get_device())
    with launcher.lock:
        launcher.pointers[0], launcher.pointers[1] = ctypes.addressof(map_w), ctypes.addressof(map_x)
        _POINTERS_AND_SIZES.pack_into(launcher.memory, _FIRST_POINTER, *values)
        launcher.start((2 * cut.clusters, 1, 1), stream)
