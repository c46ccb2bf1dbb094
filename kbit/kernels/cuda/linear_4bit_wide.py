"""Launcher of `linear_wide.cu` for 4-bit weights: products of many tokens on Hopper."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import stream_k
from kbit.kernels.cuda.linear_4bit import wgmma_header
from kbit.kernels.cuda.operands import UINT8, TensorMap, as_rows, encode_cached, half_kind, table_macros
from kbit.kernels.cuda.stream_k import Schedule, schedule, tokens_a_tile

_THREADS = 384


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the kernel, named as in its source: tokens a tile (a multiple of 32); stages."""

    nt: int
    stages: int = 4

    @property
    def shared_bytes(self) -> int:
        stages = self.stages * (self.nt * 128 + 4096 + 512)
        return 1024 + stages + 65536 + 8192 + 1024 + 16 * self.stages


def settings(config: Config, name: str, dtype: torch.dtype, nested: bool) -> tuple[dict[str, object], dict[str, str]]:
    """(macros, headers) to compile the kernel with."""
    fp16 = dtype == torch.float16
    macros: dict[str, object] = {
        "BITS": 4,
        "FP16": int(fp16),
        "NT": config.nt,
        "WIDE_STAGES": config.stages,
        **table_macros(name, dtype, nested),
    }
    return macros, {"wgmma.h": wgmma_header(config.nt, fp16)}


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


@compiler.once
def _load(device: int, config: Config, name: str, dtype: torch.dtype, nested: bool) -> compiler.Launcher:
    macros, headers = settings(config, name, dtype, nested)
    code = compiler.cubin("linear_wide", "sm_90a", macros, headers)
    function = compiler.load(code, "linear_wide", config.shared_bytes)
    return compiler.Launcher(function, _Arguments, _THREADS, config.shared_bytes)


def choose_config(m: int) -> Config:
    nt = tokens_a_tile(m)
    return Config(nt, stages=min(6, 156000 // (nt * 128 + 4096 + 512)))


@functools.lru_cache(maxsize=4096)
def _plan(
    device: int,
    m: int,
    n: int,
    k: int,
    name: str,
    dtype: torch.dtype,
    nested: bool,
    config: Config | None,
    force: Schedule | None,
) -> tuple[compiler.Launcher, Config, Schedule]:
    """Loaded kernel, settings and schedule of a product on the current device; compiled at first use."""
    config = config or choose_config(m)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    launcher = _load(device, config, name, dtype, nested)
    return launcher, config, force or schedule(processors, m, n, k, config.nt)


def linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    name: str,
    block_size: int,
    n: int,
    config: Config | None = None,
    force: Schedule | None = None,
) -> Tensor:
    """x: bf16 or fp16 `[..., K]`, weight: row layout `[N, K/2]` with K a multiple of the block size (at least 64);
    both start on 16-byte boundaries. -> `[..., N]`."""
    k = x.shape[-1]
    rows, stride = as_rows(x, k)
    m, device = rows.shape[0], x.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            scales = (absmax, nested_absmax, nested_offset)
            return linear_4bit(x, weight, *scales, bias, name, block_size, n, config, force)
    out = x.new_empty((*x.shape[:-1], n))
    dtype, nested = x.dtype, nested_absmax is not None
    launcher, config, cut = _plan(device, m, n, k, name, dtype, nested, config, force)
    map_w = encode_cached(weight.data_ptr(), UINT8, k // 2, n, k // 2, (32, 128), 1)
    map_x = encode_cached(rows.data_ptr(), half_kind(dtype), k, m, stride * 2, (64, config.nt // 2), 3)
    size, flags = cut.workspace(config.nt)
    workspace = x.new_empty(size, dtype=torch.uint8) if size else None
    at = 0 if workspace is None else workspace.data_ptr()
    values = (
        absmax.data_ptr(),
        0 if nested_absmax is None else nested_absmax.data_ptr(),
        0 if nested_offset is None else nested_offset.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        at,
        at + flags,
        next(stream_k.launches),
        m,
        n,
        k,
        block_size.bit_length() - 1,
        cut.shared_tiles,
    )
    stream = torch._C._cuda_getCurrentRawStream(device)
    with launcher.lock:
        launcher.pointers[0], launcher.pointers[1] = ctypes.addressof(map_w), ctypes.addressof(map_x)
        _POINTERS_AND_SIZES.pack_into(launcher.memory, _FIRST_POINTER, *values)
        launcher.start((2 * cut.clusters, 1, 1), stream)
    return out
