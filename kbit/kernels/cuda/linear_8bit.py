"""Launcher of `linear_8bit.cu`: the product with int8 weights and 16-bit activations on Hopper GPUs, at few tokens."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda.linear_4bit import wgmma_header
from kbit.kernels.cuda.operands import UINT8, TensorMap, as_rows, encode_cached, half_kind

_SHARED_LIMIT = 232448  # bytes a thread block of compute capability 9.0 may have
_KS = 128  # K a stage
_RULES = Path(__file__).parent / "tuned" / "hopper_8bit.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the kernel, named as in its source: tokens a tile, warpgroups along N and K, pipeline stages, parts
    of K, blocks a multiprocessor. `cluster` 0 splits K so that one wave of blocks covers the GPU."""

    nt: int
    wr: int = 1
    wk: int = 1
    stages: int = 4
    cluster: int = 1
    ctas: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.wr

    @property
    def threads(self) -> int:
        return 128 * self.wr * self.wk + 32

    @property
    def shared_bytes(self) -> int:
        stages = self.stages * (self.rows * _KS + self.nt * _KS * 2)
        parts = self.wk * self.nt * (self.rows + 4) * 4
        return 1024 + max(stages, -(-parts // 16) * 16) + 16 * self.stages

    def valid(self) -> bool:
        """Whether the kernel compiles with these and fits a multiprocessor."""
        turns = self.stages % self.wk == 0 and self.stages >= 2 * self.wk
        return turns and self.threads <= 1024 and self.shared_bytes <= _SHARED_LIMIT // self.ctas


class _Arguments(ctypes.Structure):
    """The kernel's parameters, in its order."""

    _fields_ = [
        ("map_w", TensorMap),
        ("map_x", TensorMap),
        ("absmax", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
    ]


def settings(config: Config, fp16: bool, weights: int = 1) -> tuple[dict[str, object], dict[str, str]]:
    """(macros, headers) to compile the kernel with."""
    macros: dict[str, object] = {
        "FP16": int(fp16),
        "WEIGHTS": weights,
        "NT": config.nt,
        "WR": config.wr,
        "WK": config.wk,
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "CTAS": config.ctas,
    }
    return macros, {"wgmma.h": wgmma_header(config.nt, fp16)}


@compiler.once
def _load(device: int, config: Config, fp16: bool) -> compiler.Launcher:
    code = compiler.cubin("linear_8bit", "sm_90a", *settings(config, fp16))
    function = compiler.load(code, "linear_8bit", config.shared_bytes)
    return compiler.Launcher(function, _Arguments, config.threads, config.shared_bytes)


@functools.cache
def _rules() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = json.loads(_RULES.read_text())["linear_8bit"]
    return rules


@functools.lru_cache(maxsize=4096)
def choose_config(m: int, n: int, k: int, processors: int) -> Config:
    """The settings for a product: the first rule of tuned/hopper_8bit.json with room for M and N."""
    rules = _rules()
    rule = next((r for r in rules if m <= r["max_m"] and n <= r.get("max_n", n)), rules[-1])
    config = Config(**{key: value for key, value in rule.items() if key not in ("max_m", "max_n")})
    if config.cluster == 0:
        tiles = -(-n // config.rows) * -(-m // config.nt)
        split = 1
        while split < 4 and tiles * split * 2 <= processors * config.ctas and k // (split * 2) >= 2 * _KS:
            split *= 2
        config = dataclasses.replace(config, cluster=split)
    return config


@functools.lru_cache(maxsize=4096)
def _plan(
    device: int, m: int, n: int, k: int, fp16: bool, config: Config | None
) -> tuple[compiler.Launcher, Config, tuple[int, int, int]]:
    """(kernel, its settings, grid)"""
    config = config or choose_config(m, n, k, int(torch.cuda.get_device_properties(device).multi_processor_count))
    return _load(device, config, fp16), config, (-(-n // config.rows), -(-m // config.nt), config.cluster)


def linear_8bit(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """x: bf16 or fp16 `[..., K]`, K a multiple of 16; weight: int8 `[N, K]`; both on 16-byte boundaries; absmax: fp32
    (or its bits) `[N]` -> `[..., N]`."""
    n, k = weight.shape
    device = x.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return linear_8bit(x, weight, absmax, bias, config)
    rows, stride = as_rows(x, k)
    m = rows.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    fp16 = x.dtype == torch.float16
    launcher, config, grid = _plan(device, m, n, k, fp16, config)
    map_w = encode_cached(weight.data_ptr(), UINT8, k, n, k, (_KS, config.rows), 3)
    map_x = encode_cached(rows.data_ptr(), half_kind(x.dtype), k, m, stride * 2, (64, config.nt), 3)
    with launcher.lock:
        values = launcher.values
        values.map_w, values.map_x = map_w, map_x
        values.absmax, values.out = absmax.data_ptr(), out.data_ptr()
        values.bias = None if bias is None else bias.data_ptr()
        values.m, values.n, values.k = m, n, k
        launcher.start(grid, torch.cuda.current_stream(device).cuda_stream)
    return out
