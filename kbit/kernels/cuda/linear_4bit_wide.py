"""Launcher of `linear_wide.cu` for 4-bit weights: products of many tokens on Hopper."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import linear_wide
from kbit.kernels.cuda.linear_4bit import wgmma_header
from kbit.kernels.cuda.operands import UINT8, as_rows, encode_cached, half_kind, table_macros
from kbit.kernels.cuda.stream_k import Schedule, schedule, tokens_a_tile


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


@compiler.once
def _load(device: int, config: Config, name: str, dtype: torch.dtype, nested: bool) -> compiler.Launcher:
    return linear_wide.load(*settings(config, name, dtype, nested), config.shared_bytes)


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
    scales = (absmax, nested_absmax, nested_offset)
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return linear_4bit(x, weight, *scales, bias, name, block_size, n, config, force)
    out = x.new_empty((*x.shape[:-1], n))
    dtype, nested = x.dtype, nested_absmax is not None
    launcher, config, cut = _plan(device, m, n, k, name, dtype, nested, config, force)
    map_w = encode_cached(weight.data_ptr(), UINT8, k // 2, n, k // 2, (32, 128), 1)
    map_x = encode_cached(rows.data_ptr(), half_kind(dtype), k, m, stride * 2, (64, config.nt // 2), 3)
    linear_wide.launch(launcher, cut, config.nt, map_w, map_x, scales, bias, out, (m, n, k), block_size)
    return out
