"""Launcher of `linear_4bit.cu` and `linear_8bit.cu` for several weights that multiply the same input: one row of tiles
goes through all of them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import linear_4bit as four
from kbit.kernels.cuda import linear_8bit as eight
from kbit.kernels.cuda.operands import SWIZZLE, UINT8, TensorMap, as_rows, encode, encode_cached, half_kind


class _Weight(ctypes.Structure):
    """`Weight` of the kernels' sources; 64-byte aligned there, so that its size is a multiple of that."""

    _fields_ = [
        ("map_w", TensorMap),
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
    """(descriptions of `count` weights, the kernels' parameters in their order; the int8 one takes no block_shift)."""
    weights = type("_Weights", (ctypes.Structure,), {"_fields_": [("weight", _Weight * count)]})
    fields = [
        ("weights", weights),
        ("map_x", TensorMap),
        ("outs", ctypes.c_void_p * count),
        ("m", ctypes.c_int),
        ("k", ctypes.c_int),
        ("block_shift", ctypes.c_int),
    ]
    return weights, type("_Arguments", (ctypes.Structure,), {"_fields_": fields})


@compiler.once
def _load_4bit(
    device: int, config: four.Config, name: str, dtype: torch.dtype, nested: bool, count: int
) -> compiler.Launcher:
    macros, headers = four.settings(config, name, dtype, nested, weights=count)
    code = compiler.cubin(config.source, "sm_90a", macros, headers)
    function = compiler.load(code, "linear_4bit", config.shared_bytes)
    return compiler.Launcher(function, _structures(count)[1], config.threads, config.shared_bytes)


@compiler.once
def _load_8bit(device: int, config: eight.Config, fp16: bool, count: int) -> compiler.Launcher:
    code = compiler.cubin("linear_8bit", "sm_90a", *eight.settings(config, fp16, count))
    function = compiler.load(code, "linear_8bit", config.shared_bytes)
    return compiler.Launcher(function, _structures(count)[1], config.threads, config.shared_bytes)


@functools.lru_cache(maxsize=4096)
def _plan_4bit(
    device: int, m: int, n: tuple[int, ...], k: int, name: str, dtype: torch.dtype, nested: bool, scales_by_row: bool
) -> tuple[compiler.Launcher, four.Config]:
    """(loaded kernel, settings); the settings are those of one weight with as many rows as all of them."""
    config = four.choose_config(device, m, sum(n), k, n, scales_by_row)
    return _load_4bit(device, config, name, dtype, nested, len(n)), config


@functools.lru_cache(maxsize=4096)
def _plan_8bit(
    device: int, m: int, n: tuple[int, ...], k: int, dtype: torch.dtype
) -> tuple[compiler.Launcher, eight.Config]:
    processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    config = eight.choose_config(m, sum(n), k, processors)
    return _load_8bit(device, config, dtype == torch.float16, len(n)), config


@functools.lru_cache(maxsize=4096)
def _describe(
    addresses: tuple[tuple[int, ...], ...], n: tuple[int, ...], row_bytes: int, box: tuple[int, int]
) -> ctypes.Structure:
    """The kernel's `Weights`. addresses: codes, absmax, nested_absmax, offset and bias of each weight; box: bytes and
    rows of a tile. It depends on addresses and shapes alone, so it stays right whatever tensors live there."""
    found = _structures(len(n))[0]()
    tile = 0
    for weight, (codes, absmax, nested, offset, bias), rows in zip(found.weight, addresses, n, strict=True):
        weight.map_w = encode(codes, UINT8, row_bytes, rows, row_bytes, box, SWIZZLE[box[0]])
        weight.absmax, weight.nested_absmax, weight.offset, weight.bias = absmax, nested, offset, bias
        weight.n, weight.first_tile = rows, tile
        tile += -(-rows // box[1])
    return found


def _launch(
    x: Tensor,
    columns: Sequence[Sequence[Tensor | None]],
    n: Sequence[int],
    row_bytes: int,
    block_shift: int,
    plan: Callable[[int, int], tuple[compiler.Launcher, four.Config | eight.Config, int]],
) -> list[Tensor]:
    """columns: codes, absmax, nested_absmax, offset and bias, with an entry a weight. plan: of (device, tokens) the
    loaded kernel, its settings and the bytes of codes a row and stage."""
    k = x.shape[-1]
    rows, stride = as_rows(x, k)
    m, device = rows.shape[0], x.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return _launch(x, columns, n, row_bytes, block_shift, plan)
    outs = [x.new_empty((*x.shape[:-1], count)) for count in n]
    launcher, config, stage_bytes = plan(device, m)
    addresses = tuple(tuple(0 if t is None else t.data_ptr() for t in one) for one in zip(*columns, strict=True))
    described = _describe(addresses, tuple(n), row_bytes, (stage_bytes, config.rows))
    map_x = encode_cached(rows.data_ptr(), half_kind(x.dtype), k, m, stride * 2, (64, config.nt), 3)
    grid = (sum(-(-count // config.rows) for count in n), -(-m // config.nt), config.cluster)
    stream = torch._C._cuda_getCurrentRawStream(device)
    with launcher.lock:
        launcher.pointers[0], launcher.pointers[1] = ctypes.addressof(described), ctypes.addressof(map_x)
        values = launcher.values
        for at, out in enumerate(outs):
            values.outs[at] = out.data_ptr()
        values.m, values.k, values.block_shift = m, k, block_shift
        launcher.start(grid, stream)
    return outs


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
    config: four.Config | None = None,
) -> list[Tensor]:
    """As `linear_4bit.linear_4bit`, with lists that have an entry a weight, all double-quantized or none; x has at
    least one row, and every weight too."""
    k, nested = x.shape[-1], nested_absmax[0] is not None

    def plan(device: int, m: int) -> tuple[compiler.Launcher, four.Config, int]:
        if config is None:
            by_row = all(four.rows_of_scales(nested, block_size, k, one.data_ptr()) for one in absmax)
            launcher, found = _plan_4bit(device, m, tuple(n), k, name, x.dtype, nested, by_row)
        else:
            launcher, found = _load_4bit(device, config, name, x.dtype, nested, len(n)), config
        return launcher, found, found.ks // 2

    columns = (weight, absmax, nested_absmax, nested_offset, bias)
    return _launch(x, columns, n, k // 2, block_size.bit_length() - 1, plan)


def linear_8bit_group(
    x: Tensor,
    weight: list[Tensor],
    absmax: list[Tensor],
    bias: list[Tensor | None],
    config: eight.Config | None = None,
) -> list[Tensor]:
    """As `linear_8bit.linear_8bit`, with an entry a weight in each list; x has at least one row, and every weight."""
    n = [one.shape[0] for one in weight]
    k = x.shape[-1]

    def plan(device: int, m: int) -> tuple[compiler.Launcher, eight.Config, int]:
        if config is None:
            launcher, found = _plan_8bit(device, m, tuple(n), k, x.dtype)
        else:
            launcher, found = _load_8bit(device, config, x.dtype == torch.float16, len(n)), config
        return launcher, found, eight._KS

    nothing: list[Tensor | None] = [None] * len(n)
    return _launch(x, (weight, absmax, nothing, nothing, bias), n, k, 0, plan)
