"""Launcher of `linear_4bit.cu` for several weights that multiply the same input: one row of tiles through all."""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import linear_4bit as single
from kbit.kernels.cuda.linear_4bit import Config


class _Weight(ctypes.Structure):
    """`Weight` of the kernel's source; 64-byte aligned there, so that its size is a multiple of that."""

    _fields_ = [
        ("map_w", single._TensorMap),
        ("absmax", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("first_tile", ctypes.c_int),
        ("pad", ctypes.c_char * 24),
    ]


@functools.cache
def _structures(count: int) -> tuple[type[ctypes.Structure], type[ctypes.Structure]]:
    """(descriptions of `count` weights, the kernel's parameters in its order)."""
    weights = type("_Weights", (ctypes.Structure,), {"_fields_": [("weight", _Weight * count)]})
    fields = [
        ("weights", weights),
        ("map_x", single._TensorMap),
        ("outs", ctypes.c_void_p * count),
        ("m", ctypes.c_int),
        ("k", ctypes.c_int),
        ("block_shift", ctypes.c_int),
    ]
    return weights, type("_Arguments", (ctypes.Structure,), {"_fields_": fields})


_lock = threading.Lock()


@functools.cache
def _load(device: int, config: Config, name: str, dtype: torch.dtype, nested: bool, count: int) -> compiler.Launcher:
    macros, headers = single.settings(config, name, dtype, nested, weights=count)
    code = compiler.cubin("linear_4bit", "sm_90a", macros, headers)
    function = compiler.load(code, "linear_4bit", config.shared_bytes)
    return compiler.Launcher(function, _structures(count)[1], config.threads, config.shared_bytes)


@functools.lru_cache(maxsize=4096)
def _plan(
    device: int, m: int, n: tuple[int, ...], k: int, name: str, dtype: torch.dtype, nested: bool, config: Config | None
) -> tuple[compiler.Launcher, tuple[int, int, int], Config]:
    """(loaded kernel, grid, settings); the settings are those of one weight with as many rows as all of them."""
    config = config or single.choose_config(device, m, sum(n), k)
    with _lock:
        launcher = _load(device, config, name, dtype, nested, len(n))
    tiles = sum(-(-rows // config.rows) for rows in n)
    return launcher, (tiles, -(-m // config.nt), config.cluster), config


@functools.lru_cache(maxsize=4096)
def _describe(addresses: tuple[tuple[int, ...], ...], n: tuple[int, ...], k: int, config: Config) -> ctypes.Structure:
    """The kernel's `Weights`. addresses: codes, absmax, nested_absmax, offset and bias of each weight. It depends on
    addresses and shapes alone, so it stays right whatever tensors live there."""
    found = _structures(len(n))[0]()
    box = (config.ks // 2, config.rows)
    tile = 0
    for weight, (codes, absmax, nested, offset, bias), rows in zip(found.weight, addresses, n, strict=True):
        weight.map_w = single._encode(codes, single._UINT8, k // 2, rows, k // 2, box, single._SWIZZLE[box[0]])
        weight.absmax, weight.nested_absmax, weight.offset, weight.bias = absmax, nested, offset, bias
        weight.n, weight.first_tile = rows, tile
        tile += -(-rows // config.rows)
    return found


def linear_4bit_group(
    x: Tensor,
    weight: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor | None],
    nested_offset: list[Tensor | None],
    bias: list[Tensor | None],
    name: str,
    block_size: int,
    n: list[int],
    config: Config | None = None,
) -> list[Tensor]:
    """As `linear_4bit.linear_4bit`, with lists that have an entry a weight, all double-quantized or none; x has at
    least one row, and every weight too."""
    k = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    m, device = rows.shape[0], x.get_device()
    stride, step = rows.stride()
    if m == 1:
        stride = k
    if step != 1 or stride % 8 or stride < k:
        rows, stride = rows.contiguous(), k
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            scales = (absmax, nested_absmax, nested_offset)
            return linear_4bit_group(x, weight, *scales, bias, name, block_size, n, config)
    outs = [x.new_empty((*x.shape[:-1], count)) for count in n]
    nested = nested_absmax[0] is not None
    launcher, grid, config = _plan(device, m, tuple(n), k, name, x.dtype, nested, config)
    parts = zip(weight, absmax, nested_absmax, nested_offset, bias, strict=True)
    addresses = tuple(tuple(0 if t is None else t.data_ptr() for t in one) for one in parts)
    described = _describe(addresses, tuple(n), k, config)
    kind = single._FLOAT16 if x.dtype == torch.float16 else single._BFLOAT16
    map_x = single._encode_cached(rows.data_ptr(), kind, k, m, stride * 2, (64, config.nt), 3)
    stream = torch._C._cuda_getCurrentRawStream(device)
    with launcher.lock:
        launcher.pointers[0], launcher.pointers[1] = ctypes.addressof(described), ctypes.addressof(map_x)
        values = launcher.values
        for at, out in enumerate(outs):
            values.outs[at] = out.data_ptr()
        values.m, values.k, values.block_shift = m, k, block_size.bit_length() - 1
        launcher.start(grid, stream)
    return outs
