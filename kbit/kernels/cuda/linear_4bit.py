"""Launcher of `linear_4bit.cu`, for one weight or those of experts: tensor maps, settings by shape, launch."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda.operands import SWIZZLE, UINT8, TensorMap, as_rows, encode_cached, half_kind, table_macros

FOLDER = Path(__file__).parent / "tuned"
_SHARED_LIMIT = 232448  # bytes a thread block of compute capability 9.0 may have


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the kernel, named as in its source: tokens a tile, warpgroups along N and K, K a stage, ..."""

    nt: int
    wr: int = 1
    wk: int = 1
    ks: int = 256
    stages: int = 4
    cluster: int = 1
    ctas: int = 1
    acc_scale: bool = True
    registers: int = 0
    rw: int = 64
    r: int = 0
    scales: int = 0

    @property
    def source(self) -> str:
        """The kernel: of few tokens, where a warp has `r` tiles of 16 rows, or the one with warpgroups."""
        return "linear_4bit_few" if self.r else "linear_4bit"

    @property
    def rows(self) -> int:
        return 16 * self.r * self.wr if self.r else self.rw * self.wr

    @property
    def threads(self) -> int:
        if self.r:
            return 32 * self.wr * self.wk + 32
        return 128 * self.wr * self.wk + (128 if self.registers else 32)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: stages, pair table, dynamic map, barriers; the epilogue's buffer reuses them."""
        stages = self.stages * (self.rows * self.ks // 2 + self.nt * self.ks * 2)
        main = stages + 65536 + 1024 + 16 * self.stages + self.scales * 16 * self.rows
        return 1024 + max(main, self.wk * self.nt * (self.rows + 4) * 4)

    def valid(self) -> bool:
        """Whether the kernel compiles with these and fits a multiprocessor."""
        if self.r:
            fits = self.threads <= 1024 and self.shared_bytes <= _SHARED_LIMIT // self.ctas and self.rows <= 256
            return fits and self.ks == 256 and 4 % self.wk == 0 and self.scales % 2 == 1
        # A warpgroup holds one stage while it waits for its next one; other numbers of stages would deadlock.
        turns = self.stages % self.wk == 0 and self.stages >= 2 * self.wk and (self.wk == 1 or self.ks > 64)
        # Consumers take registers over from the 128 threads of the producer, which keep 32; asking for more hangs.
        entry = min(255, 65536 // self.ctas // self.threads // 8 * 8)
        spare = (entry * self.threads - 32 * 128) // (128 * self.wr * self.wk)
        # x, behind the codes, starts where its swizzle does.
        aligned = self.stages * self.rows * self.ks // 2 % 1024 == 0
        fits = self.threads <= 1024 and self.shared_bytes <= _SHARED_LIMIT // self.ctas
        return turns and fits and aligned and self.ks in (64, 128, 256) and self.registers <= spare


def wgmma_header(nt: int, fp16: bool) -> str:
    """The device function `wgmma` for m64 n`nt` k16 with the left operand in registers."""
    count = nt // 2
    outputs = ", ".join(f"%{i}" for i in range(count))
    inputs = ", ".join(f"%{count + i}" for i in range(4))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    kind = "f16" if fp16 else "bf16"
    shape = f"wgmma.mma_async.sync.aligned.m64n{nt}k16.f32.{kind}.{kind}"
    return f"""__device__ __forceinline__ void wgmma(float (&d)[{count}], const u32* a, u64 b, int accumulate) {{
  asm volatile("{{\\n .reg .pred p;\\n setp.ne.b32 p, %{count + 5}, 0;\\n"
    "{shape} {{{outputs}}}, {{{inputs}}}, %{count + 4}, p, 1, 1, 0;\\n}}"
    : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}}
"""


def settings(
    config: Config, name: str, dtype: torch.dtype, nested: bool, grouped: bool = False, weights: int = 1
) -> tuple[dict[str, object], dict[str, str]]:
    """(macros, headers) to compile the kernel with."""
    fp16 = dtype == torch.float16
    macros: dict[str, object] = {
        "FP16": int(fp16),
        "GROUPED": int(grouped),
        "WEIGHTS": weights,
        "NT": config.nt,
        "RW": config.rw,
        "R": config.r,
        "SCALES": config.scales,
        "WR": config.wr,
        "WK": config.wk,
        "KS": config.ks,
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "CTAS": config.ctas,
        "ACC_SCALE": int(config.acc_scale),
        "REGISTERS": config.registers,
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
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("block_shift", ctypes.c_int),
        ("offsets", ctypes.c_void_p),
        ("experts", ctypes.c_int),
    ]


_POINTERS_AND_SIZES = struct.Struct("PPPPPiiiiPi")  # _Arguments from absmax on
_FIRST_POINTER: int = _Arguments.absmax.offset


@compiler.once
def _load(device: int, config: Config, name: str, dtype: torch.dtype, nested: bool, grouped: bool) -> compiler.Launcher:
    macros, headers = settings(config, name, dtype, nested, grouped)
    code = compiler.cubin(config.source, "sm_90a", macros, headers)
    function = compiler.load(code, "linear_4bit", config.shared_bytes)
    return compiler.Launcher(function, _Arguments, config.threads, config.shared_bytes)


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
    experts: int,
    scales_by_row: bool,
) -> tuple[compiler.Launcher, tuple[int, int, int], tuple[int, int], tuple[int, int]]:
    """(loaded kernel, grid, box of W's codes, box of x) of a product on the current device; compiled at first use.
    experts: 0 for one weight. scales_by_row: of `rows_of_scales`."""
    if config is None and experts:  # tiles with room for twice an expert's share, as many as experts can have rows
        config = choose_config(device, min(m, 2 * -(-m // experts)), n * min(m, experts), k)
    config = config or choose_config(device, m, n, k, few=scales_by_row)
    launcher = _load(device, config, name, dtype, nested, experts > 0)
    # Of rows of experts: the most tiles that there can be, nobody's rows included.
    tiles = min(m, experts + 1 + m // config.nt) if experts else -(-m // config.nt)
    grid = (-(-n // config.rows), tiles, config.cluster)
    return launcher, grid, (config.ks // 2, config.rows), (64, config.nt)


@functools.cache
def _rules(device: int) -> tuple[list[dict[str, Any]], int]:
    rules = json.loads((FOLDER / "hopper.json").read_text())["linear_4bit"]
    return rules, torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=4096)
def choose_config(device: int, m: int, n: int, k: int, weights: tuple[int, ...] = (), few: bool = False) -> Config:
    """The settings for a product: the first rule of tuned/hopper.json with room for M and N. weights: the rows of each,
    where N is those of several. few: whether the kernel of few tokens may serve (`rows_of_scales`, no experts)."""
    rules, processors = _rules(device)
    for rule in [*rules, rules[-1] | {"max_m": m}]:
        if ("r" not in rule or few) and m <= rule["max_m"] and n <= rule.get("max_n", n):
            config = Config(**{key: value for key, value in rule.items() if key not in ("max_m", "max_n")})
            config = share_out(config, m, weights or (n,), k, processors)
            config = with_scales(config, k) if config.r else config
            if config.valid() or "r" not in rule:
                break
    return config


def share_out(config: Config, m: int, n: tuple[int, ...], k: int, processors: int) -> Config:
    """`config` with the parts of K (where `cluster` is 0) and the rows a warpgroup (where `rw` is 0: 64 or 56) that
    leave the busiest multiprocessor the least work. One wave of thread blocks covers the GPU; beyond 4 parts adding
    them up costs more than it brings. Fewer rows cost more than they bring for small N, and at 17 to 32 tokens."""
    best, least = config, float("inf")
    for rows in (config.rw,) if config.rw else (64, 56):
        found = dataclasses.replace(config, rw=rows)
        tiles = sum(-(-count // found.rows) for count in n) * -(-m // config.nt)
        split = config.cluster or 1
        if config.cluster == 0:
            while split < 4 and tiles * split * 2 <= processors * config.ctas and k // (split * 2) >= 2 * config.ks:
                split *= 2
        found = dataclasses.replace(found, cluster=split)
        work = -(-tiles * split // (processors * config.ctas)) * rows / split
        if work < least:
            best, least = found, work
    return best


def rows_of_scales(nested: bool, block_size: int, k: int, absmax: int) -> bool:
    """Whether the scales are rows of bytes on 16-byte boundaries, as the kernel of few tokens needs them. absmax: their
    address."""
    return nested and block_size == 64 and k % 1024 == 0 and absmax % 16 == 0


def with_scales(config: Config, k: int) -> Config:
    """`config` of the kernel of few tokens with room for the scales of a thread block's part of K, which may begin
    within 16 bytes of a row, those of four stages."""
    stages = -(-k // (config.ks * config.cluster))
    chunks = -(-(stages + (3 if config.cluster > 1 and stages % 4 else 0)) // 4)
    return dataclasses.replace(config, scales=chunks | 1)


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
    offsets: Tensor | None = None,
) -> Tensor:
    """x: bf16 or fp16 `[..., K]`, weight: row layout `[N, K/2]` with K a multiple of the block size (at least 64);
    both start on 16-byte boundaries. -> `[..., N]`. offsets: int32 `[E]`, where the rows of each expert end; then x is
    `[S, K]`, weight `[E, N, K/2]`, bias `[E, N]`."""
    # Every microsecond here is one of an eager call: no stream object, no field-by-field filling, nothing imported.
    k = x.shape[-1]
    rows, stride = as_rows(x, k)
    m, device = rows.shape[0], x.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            parts = (absmax, nested_absmax, nested_offset)
            return linear_4bit(x, weight, *parts, bias, name, block_size, n, config, offsets)
    out = x.new_empty((*x.shape[:-1], n))
    dtype, nested = x.dtype, nested_absmax is not None
    experts = 0 if offsets is None else offsets.shape[0]
    scales = absmax.data_ptr()
    by_row = rows_of_scales(nested, block_size, k, scales)
    launcher, grid, box_w, box_x = _plan(device, m, n, k, name, dtype, nested, config, experts, by_row)
    all_rows = n * experts if experts else n
    map_w = encode_cached(weight.data_ptr(), UINT8, k // 2, all_rows, k // 2, box_w, SWIZZLE[box_w[0]])
    map_x = encode_cached(rows.data_ptr(), half_kind(dtype), k, m, stride * 2, box_x, 3)
    values = (
        scales,
        0 if nested_absmax is None else nested_absmax.data_ptr(),
        0 if nested_offset is None else nested_offset.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        m,
        n,
        k,
        block_size.bit_length() - 1,
        0 if offsets is None else offsets.data_ptr(),
        experts,
    )
    stream = torch._C._cuda_getCurrentRawStream(device)
    with launcher.lock:
        launcher.pointers[0], launcher.pointers[1] = ctypes.addressof(map_w), ctypes.addressof(map_x)
        _POINTERS_AND_SIZES.pack_into(launcher.memory, _FIRST_POINTER, *values)
        launcher.start(grid, stream)
    return out
