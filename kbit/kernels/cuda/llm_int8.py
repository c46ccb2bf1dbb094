"""Launchers of `quantize_rows.cu` and `llm_int8.cu`: LLM.int8() at many tokens on Hopper GPUs, all on the device."""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda.linear_4bit import _UINT8, _encode_cached, _TensorMap

_SHARED_LIMIT = 232448  # bytes a thread block of compute capability 9.0 may have
_BM, _BK = 128, 128
_THREADS = 384
MAX_K = 32768  # columns that the kernel's bit mask has room for


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the kernel, named as in its source: out features a tile, pipeline stages, blocks that share weights,
    blocks that split K; and the height of a group of tiles."""

    bn: int
    stages: int = 4
    cluster: int = 1
    split: int = 1
    group: int = 8

    @property
    def shared_bytes(self) -> int:
        stages = self.stages * (_BM + self.bn) * _BK
        outliers = (_BM + self.bn) * 16 * 2
        return 1024 + stages + outliers + 8 * 16 * 80 + 512 * 2 + 16 * self.bn + 4096 + 16 * self.stages + 64

    def valid(self) -> bool:
        """Whether the kernel compiles with these and fits a multiprocessor."""
        clusters = (self.cluster, self.split) in ((1, 1), (2, 1), (1, 2), (1, 4), (1, 8))
        part = self.split == 1 or _BM * (self.bn + 8) * 4 <= self.stages * (_BM + self.bn) * _BK
        sizes = self.bn % 32 == 0 and 32 <= self.bn <= 256 and self.shared_bytes <= _SHARED_LIMIT
        return clusters and part and sizes

    def tiles(self, m: int, n: int) -> int:
        """Tiles of an output `[M, N]`, those that fill up a cluster included."""
        height = _BM * self.cluster
        return -(-m // height) * self.cluster * -(-n // self.bn)


@functools.lru_cache(maxsize=4096)
def choose_config(m: int, n: int, k: int, processors: int) -> Config:
    """The settings with the least work on the busiest multiprocessor.

    A step of a tile takes as long as its products, `bn`, but never less than its shared memory needs; a tile costs
    about four steps more for its epilogue, and eight where parts of K meet. Sharing weights in a cluster pays where
    many tiles are at work for long (measured on one H200)."""
    cluster = 2 if m >= 2048 else 1
    steps = -(-k // _BK)
    best, least = Config(128), float("inf")
    for bn in (256, 224, 192, 128):
        for split in (1, 2, 4) if cluster == 1 else (1,):
            config = Config(bn, 4, cluster, split)
            waves = -(-config.tiles(m, n) * split // (processors // cluster * cluster))
            cost = waves * (-(-steps // split) * max(bn, 170) + (4 if split == 1 else 8) * bn)
            if cost < least:
                best, least = config, cost
    return best


def wgmma_header(bn: int, fp16: bool) -> str:
    """The device functions `wgmma_s8` (m64 n`bn` k32) and `wgmma_half` (k16), operands in shared memory. Both work on
    the same registers: bits of int32 for the one, of fp32 for the other."""
    count = bn // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    kind = "f16" if fp16 else "bf16"
    both = f"%{count}, %{count + 1}"
    return f"""__device__ __forceinline__ void wgmma_s8(int (&d)[{count}], u64 a, u64 b, int accumulate) {{
  asm volatile("{{\\n .reg .pred p;\\n setp.ne.b32 p, %{count + 2}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{bn}k32.s32.s8.s8 {{{sums}}}, {both}, p;\\n}}"
    : {operands} : "l"(a), "l"(b), "r"(accumulate));
}}
__device__ __forceinline__ void wgmma_half(int (&d)[{count}], u64 a, u64 b) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{bn}k16.f32.{kind}.{kind} {{{sums}}}, {both}, 1, 1, 1, 0, 0;"
    : {operands} : "l"(a), "l"(b));
}}
"""


class _Arguments(ctypes.Structure):
    """The kernel's parameters, in its order."""

    _fields_ = [
        ("map_a", _TensorMap),
        ("map_w", _TensorMap),
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("stride_x", ctypes.c_int),
        ("stride_codes", ctypes.c_int),
        ("group", ctypes.c_int),
    ]


@functools.cache
def _load(device: int, config: Config, fp16: bool) -> compiler.Launcher:
    bn, shared = config.bn, config.shared_bytes
    macros = {"FP16": int(fp16), "BN": bn, "STAGES": config.stages, "CLUSTER": config.cluster, "SPLIT": config.split}
    code = compiler.cubin("llm_int8", "sm_90a", macros, {"wgmma.h": wgmma_header(bn, fp16)})
    return compiler.Launcher(compiler.load(code, "llm_int8", shared), _Arguments, _THREADS, shared)


class _RowArguments(ctypes.Structure):
    """The parameters of quantize_rows.cu, in its order."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("k", ctypes.c_int),
        ("stride_x", ctypes.c_int),
        ("limit", ctypes.c_uint),
    ]


@functools.cache
def _load_rows(device: int, vectors: int, threads: int, fp16: bool) -> compiler.Launcher:
    macros = {"FP16": int(fp16), "VECTORS": vectors, "THREADS": threads}
    code = compiler.cubin("quantize_rows", "sm_90a", macros, {})
    return compiler.Launcher(compiler.load(code, "quantize_rows", 0), _RowArguments, threads, 0)


@functools.lru_cache(maxsize=256)
def outlier_limit(threshold: float, dtype: torch.dtype) -> int:
    """Bits of the least magnitude of a 16-bit dtype that is at least `threshold`; 0xffff: nothing is an outlier."""
    wanted = torch.tensor(threshold, dtype=torch.float32)
    bits = int(wanted.to(dtype).view(torch.int16))
    while bits < 0x7FFF and not torch.tensor(bits, dtype=torch.int16).view(dtype).float() >= wanted:
        bits += 1
    return bits if threshold > 0 and bits < 0x7FFF else 0xFFFF


def quantize_rows(x: Tensor, codes: Tensor, rows: Tensor, flags: Tensor | None, threshold: float, stream: int) -> None:
    """x: bf16 or fp16 `[M, K]`, rows 16 bytes apart, K a multiple of 8 up to MAX_K -> codes int8 `[M, K]`, rows fp32
    `[M]`; flags uint8 `[K]`: those of columns with a magnitude of at least `threshold` become 1."""
    m, k = x.shape
    threads = 512 if k > 4096 and m < 512 else 256  # few long rows: more threads hide their latency
    launcher = _load_rows(x.device.index, -(-k // (8 * threads)), threads, x.dtype == torch.float16)
    with launcher.lock:
        values = launcher.values
        values.x, values.codes, values.rows = x.data_ptr(), codes.data_ptr(), rows.data_ptr()
        values.flags = None if flags is None else flags.data_ptr()
        values.k, values.stride_x = k, x.stride(0) if m > 1 else k
        values.limit = outlier_limit(threshold, x.dtype) if flags is not None else 0xFFFF
        launcher.start((m, 1, 1), stream)


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def llm_int8(
    x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, config: Config | None = None
) -> Tensor:
    """x: bf16 or fp16 `[..., K]`, K a multiple of 16 up to MAX_K; weight: int8 `[N, K]`; both on 16-byte boundaries;
    absmax: fp32 (or its bits) `[N]` -> `[..., N]`, as `kbit.kernels.triton.llm_int8`."""
    n, k = weight.shape
    device = x.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return llm_int8(x, weight, absmax, bias, threshold, config)
    inner = x.reshape(-1, k)
    m = inner.shape[0]
    if inner.stride(1) != 1 or (m > 1 and (inner.stride(0) % 8 or inner.stride(0) < k)):
        inner = inner.contiguous()
    config = config or choose_config(m, n, k, _processors(device))
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    rows = torch.empty(m, dtype=torch.float32, device=x.device)
    flags = torch.zeros(k, dtype=torch.uint8, device=x.device) if threshold > 0 else None
    stream = torch.cuda.current_stream(device).cuda_stream
    quantize_rows(inner, codes, rows, flags, threshold, stream)

    launcher = _load(device, config, x.dtype == torch.float16)
    map_a = _encode_cached(codes.data_ptr(), _UINT8, k, m, k, (_BK, _BM), 3)
    map_w = _encode_cached(weight.data_ptr(), _UINT8, k, n, k, (_BK, config.bn // config.cluster), 3)
    with launcher.lock:
        values = launcher.values
        values.map_a, values.map_w = map_a, map_w
        values.x, values.codes, values.weight = inner.data_ptr(), codes.data_ptr(), weight.data_ptr()
        values.rows, values.absmax = rows.data_ptr(), absmax.data_ptr()
        values.bias = None if bias is None else bias.data_ptr()
        values.flags = None if flags is None else flags.data_ptr()
        values.out = out.data_ptr()
        values.m, values.n, values.k = m, n, k
        values.stride_x, values.stride_codes = inner.stride(0), k
        values.group = config.group
        # Blocks walk over tiles, but for those that split K: these have one each.
        blocks = config.tiles(m, n) * config.split
        if config.split == 1:
            blocks = min(_processors(device) // config.cluster * config.cluster, blocks)
        launcher.start((blocks, 1, 1), stream)
    return out
