"""Launcher of `linear_wide.cu` for int8 weights: products of many tokens on Hopper whose inputs stay in 16 bits."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import linear_wide
from kbit.kernels.cuda.linear_4bit import wgmma_header
from kbit.kernels.cuda.operands import UINT8, TensorMap, as_rows, encode_cached, half_kind
from kbit.kernels.cuda.stream_k import Schedule, schedule, tokens_a_tile


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the kernel, named as in its source: tokens a tile (a multiple of 32); stages."""

    nt: int
    stages: int = 5

    @property
    def shared_bytes(self) -> int:
        return 1024 + self.stages * (self.nt * 128 + 8192) + 8192 + 16 * self.stages


def settings(config: Config, fp16: bool) -> tuple[dict[str, object], dict[str, str]]:
    """(macros, headers) to compile the kernel with."""
    macros: dict[str, object] = {"BITS": 8, "FP16": int(fp16), "NT": config.nt, "WIDE_STAGES": config.stages}
    return macros, {"wgmma.h": wgmma_header(config.nt, fp16)}


@compiler.once
def _load(device: int, config: Config, fp16: bool) -> compiler.Launcher:
    return linear_wide.load(*settings(config, fp16), config.shared_bytes)


def choose_config(m: int) -> Config:
    nt = tokens_a_tile(m)
    return Config(nt, stages=min(8, 220000 // (nt * 128 + 8192)))


@functools.lru_cache(maxsize=4096)
def _plan(
    device: int, m: int, n: int, k: int, fp16: bool, force: Schedule | None
) -> tuple[compiler.Launcher, Config, Schedule]:
    """Loaded kernel, settings and schedule of a product on the current device; compiled at first use."""
    config = choose_config(m)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _load(device, config, fp16), config, force or schedule(processors, m, n, k, config.nt)


def tensor_maps(config: Config, rows: Tensor, stride: int, weight: Tensor) -> tuple[TensorMap, TensorMap]:
    """(of the weight's codes, of x) as `wide.h` copies them. rows, stride: of `operands.as_rows`."""
    (n, k), m = weight.shape, rows.shape[0]
    map_w = encode_cached(weight.data_ptr(), UINT8, k, n, k, (64, 128), 2)
    kind = half_kind(rows.dtype)
    return map_w, encode_cached(rows.data_ptr(), kind, k, m, stride * 2, (64, config.nt // 2), 3)


def linear_8bit(
    x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, force: Schedule | None = None
) -> Tensor:
    """x: bf16 or fp16 `[..., K]`, K a multiple of 16; weight: int8 `[N, K]`; both on 16-byte boundaries; absmax: fp32
    (or its bits) `[N]` -> `[..., N]`."""
    n, k = weight.shape
    device = x.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return linear_8bit(x, weight, absmax, bias, force)
    rows, stride = as_rows(x, k)
    m = rows.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    launcher, config, cut = _plan(device, m, n, k, x.dtype == torch.float16, force)
    map_w, map_x = tensor_maps(config, rows, stride, weight)
    linear_wide.launch(launcher, cut, config.nt, map_w, map_x, (absmax, None, None), bias, out, (m, n, k))
    return out
