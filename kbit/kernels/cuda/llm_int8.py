"""Launchers of `quantize_rows.cu` and `llm_int8.cu`: LLM.int8() at many tokens on Hopper GPUs, all on the device."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import linear_8bit_wide
from kbit.kernels.cuda.operands import UINT8, TensorMap, as_rows, encode_cached
from kbit.kernels.cuda.stream_k import Schedule, launches, schedule, tokens_a_tile

_SHARED_LIMIT = 232448  # bytes a thread block of compute capability 9.0 may have
_BM, _BK = 128, 128
_THREADS = 384
# From GATHER_TOKENS tokens on, up to _CAPACITY outlier columns are put side by side.
GATHER_TOKENS = 512
_CAPACITY, _GATHER_ROWS = 256, 32
# The 16-bit product's tiles: few kinds, since each is compiled into a kernel with the int8 product's.
_WIDE = tuple(linear_8bit_wide.Config(nt, stages) for nt, stages in ((96, 8), (128, 8), (192, 6), (256, 5)))
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
    def blocks(self) -> int:
        """Thread blocks a cluster: pairs at least, which share inputs when all columns are multiplied in 16 bits."""
        return max(2, self.cluster * self.split)

    @property
    def shared_bytes(self) -> int:
        stages = self.stages * (_BM + self.bn) * _BK
        outliers = (_BM + self.bn) * 16 * 2
        codes = 1024 + stages + outliers + 8 * 16 * 80 + _CAPACITY * 2 + 16 * self.bn + 4096 + 16 * self.stages + 64
        return max(codes, *(wide.shared_bytes for wide in _WIDE))  # of the 16-bit product instead

    def valid(self) -> bool:
        """Whether the kernel compiles with these and fits a multiprocessor."""
        clusters = (self.cluster, self.split) in ((1, 1), (1, 2), (1, 4), (2, 1))
        part = self.split == 1 or _BM * (self.bn + 8) * 4 <= self.stages * (_BM + self.bn) * _BK
        sizes = self.bn % 32 == 0 and 32 <= self.bn <= 256 and self.shared_bytes <= _SHARED_LIMIT
        return clusters and part and sizes

    def tiles(self, m: int, n: int) -> int:
        """Tiles of an output `[M, N]`, those that fill up a cluster included."""
        height = _BM * self.cluster
        return -(-m // height) * self.cluster * -(-n // self.bn)


def _at_work(processors: int, blocks: int) -> int:
    """Multiprocessors that clusters of so many thread blocks find: four do not fill all parts of a GPU."""
    return processors if blocks < 3 else processors * 9 // 10


@functools.lru_cache(maxsize=4096)
def choose_config(m: int, n: int, k: int, processors: int) -> Config:
    """The settings with the least work on the busiest multiprocessor.

    A step of a tile takes as long as its products, `bn`, and about as much as 330 features more for its barriers and
    loads; a tile, four steps' products for its epilogue, and eight where parts of K meet. Clusters of four leave
    some multiprocessors of a GPU's parts idle. Sharing weights pays where many tiles are at work for long.
    Fitted to one H200."""
    cluster = 2 if m >= 2048 else 1
    steps = -(-k // _BK)
    best, least = Config(128), float("inf")
    for bn in (256, 224, 192, 128):
        for split in (1, 2, 4) if cluster == 1 else (1,):
            config = Config(bn, 4, cluster, split)
            room = _at_work(processors, cluster * split) // (cluster * split)
            waves = -(-config.tiles(m, n) // (cluster * room))
            # Half a main loop is also too short to hide the fetching of outlier columns: 5000 is about 6 us.
            ends = 4 * bn if split == 1 else 8 * bn + 5000
            cost = waves * (-(-steps // split) * (bn + 330) + ends)
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
__device__ __forceinline__ void wgmma_half(int (&d)[{count}], u64 a, u64 b, int accumulate) {{
  asm volatile("{{\\n .reg .pred p;\\n setp.ne.b32 p, %{count + 2}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{bn}k16.f32.{kind}.{kind} {{{sums}}}, {both}, p, 1, 1, 0, 0;\\n}}"
    : {operands} : "l"(a), "l"(b), "r"(accumulate));
}}
"""


class _Arguments(ctypes.Structure):
    """The kernel's parameters, in its order."""

    _fields_ = [
        ("map_a", TensorMap),
        ("map_w", TensorMap),
        ("wide_w", TensorMap),
        ("wide_x", TensorMap),
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        ("sub", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("wide_flags", ctypes.c_void_p),
        ("launch", ctypes.c_uint64),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("stride_x", ctypes.c_int),
        ("stride_codes", ctypes.c_int),
        ("group", ctypes.c_int),
        ("limit", ctypes.c_int),
        ("workers", ctypes.c_int),
        ("wide_blocks", ctypes.c_int),
        ("shared_tiles", ctypes.c_int),
    ]


_POINTERS_AND_SIZES = struct.Struct("12PQ10i")  # _Arguments from x on
_FIRST_POINTER: int = _Arguments.x.offset


@compiler.once
def _load(device: int, config: Config, wide: linear_8bit_wide.Config, fp16: bool) -> compiler.Launcher:
    bn, shared = config.bn, config.shared_bytes
    macros = {"FP16": int(fp16), "BN": bn, "STAGES": config.stages, "CLUSTER": config.cluster, "SPLIT": config.split}
    macros |= {"CAPACITY": _CAPACITY}
    of_wide, headers = linear_8bit_wide.settings(wide, fp16)
    code = compiler.cubin("llm_int8", "sm_90a", macros | of_wide, headers | {"wgmma_s8.h": wgmma_header(bn, fp16)})
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
        ("most", ctypes.c_uint),
    ]


_OF_ROWS = struct.Struct("4PiiII")  # _RowArguments


@compiler.once
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


@functools.cache
def _memset() -> Any:
    """The driver's fill: cheaper to call than a tensor of zeros, and captured in a CUDA graph like a kernel."""
    fill = compiler.driver().cuMemsetD8Async
    fill.argtypes = [ctypes.c_void_p, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p]
    return fill


@functools.lru_cache(maxsize=4096)
def _row_launcher(device: int, m: int, k: int, fp16: bool) -> compiler.Launcher:
    threads = 512 if k > 4096 and m < 512 else 256  # few long rows: more threads hide their latency
    return _load_rows(device, -(-k // (8 * threads)), threads, fp16)


def quantize_rows(
    x: Tensor, codes: int, rows: int, flags: int | None, threshold: float, stream: int, most: int = 2**31
) -> None:
    """x: bf16 or fp16 `[M, K]`, rows 16 bytes apart, K a multiple of 8 up to MAX_K -> at these addresses: codes int8
    `[M, K]`; rows fp32 `[M]`; flags uint8 `[K]`, 1 for columns with a magnitude of at least `threshold`, else 0.
    Without an address (None or 0) no flags are written. most: where a row has more outliers, the word behind the flags
    is 1, else 0, and its codes, scale and flags may be anything; the flags then have room for 16 more."""
    m, k = x.shape
    launcher = _row_launcher(x.device.index, m, k, x.dtype == torch.float16)
    if flags:
        size = k + 16 if most < 2**31 else k
        compiler.check(_memset()(flags, 0, size, stream), "clearing the flags of outlier columns")
    bits = outlier_limit(threshold, x.dtype) if flags else 0xFFFF
    stride = x.stride(0) if m > 1 else k
    with launcher.lock:
        _OF_ROWS.pack_into(launcher.memory, 0, x.data_ptr(), codes, rows, flags or 0, k, stride, bits, most)
        launcher.start((m, 1, 1), stream)


class _GatherArguments(ctypes.Structure):
    """The parameters of gather_columns.cu, in its order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "weight", "rows", "flags", "rest", "sub")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "stride_x", "rows_w")),
    ]


_OF_GATHER = struct.Struct("7P5i")  # _GatherArguments


@compiler.once
def _load_gather(device: int, fp16: bool) -> compiler.Launcher:
    macros = {"FP16": int(fp16), "CAPACITY": _CAPACITY, "ROWS": _GATHER_ROWS}
    code = compiler.cubin("gather_columns", "sm_90a", macros, {})
    return compiler.Launcher(compiler.load(code, "gather_columns", 0), _GatherArguments, _CAPACITY, 0)


class _Plan(NamedTuple):
    """All of a product that its shape decides."""

    launcher: compiler.Launcher
    grid: tuple[int, int, int]
    box_w: tuple[int, int]  # of W's codes; one byte a code
    wide: linear_8bit_wide.Config  # for too many outlier columns
    cut: Schedule
    workers: int  # clusters that multiply in int8
    group: int
    gather: compiler.Launcher | None  # where outlier columns are put side by side
    gather_grid: tuple[int, int, int]
    rows_w: int
    start: int  # bytes of codes, flags and scales in the scratch memory
    sums: int  # where the 16-bit product's unfinished sums begin, and what marks them
    marks: int
    size: int  # all of it


@functools.lru_cache(maxsize=4096)
def _plan(device: int, m: int, n: int, k: int, fp16: bool, marked: bool, config: Config | None) -> _Plan:
    processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    config = config or choose_config(m, n, k, processors)
    # Blocks walk over tiles, but for those that split K: these have one each.
    room = _at_work(processors, config.blocks)
    workers = config.tiles(m, n) // config.cluster
    if config.split == 1:
        workers = min(processors // config.cluster, workers)
    wide = next(c for c in _WIDE if c.nt >= tokens_a_tile(m))
    cut = schedule(room, m, n, k, wide.nt)
    blocks = max(workers * config.cluster * config.split, 2 * cut.clusters)
    # One allocation: codes [M, K], flags [K] and what else `quantize_rows` says, row scales [M]; K is a multiple of 16,
    # so each starts on such a boundary.
    # Then, where outlier columns are put side by side, those of x [M, _CAPACITY] and of W [N, _CAPACITY]. Then
    # the 16-bit product's unfinished sums.
    gathered = marked and m >= GATHER_TOKENS
    rows_w = min(32, max(2, n // 512))  # blocks enough to fill the GPU, and few of them idle
    start = (m * k + k + 16 + 4 * m + 15) // 16 * 16
    sums = start + ((m + n) * _CAPACITY * 2 if gathered else 0)
    of_sums, marks = cut.workspace(wide.nt) if marked else (0, 0)
    return _Plan(
        launcher=_load(device, config, wide, fp16),
        grid=(-(-blocks // config.blocks) * config.blocks, 1, 1),
        box_w=(_BK, config.bn // config.cluster),
        wide=wide,
        cut=cut,
        workers=workers,
        group=config.group,
        gather=_load_gather(device, fp16) if gathered else None,
        gather_grid=(-(-m // _GATHER_ROWS) + -(-n // rows_w), 1, 1),
        rows_w=rows_w,
        start=start,
        sums=sums,
        marks=sums + marks,
        size=sums + of_sums,
    )


def llm_int8(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    config: Config | None = None,
    limit: int = _CAPACITY,
) -> Tensor:
    """x: bf16 or fp16 `[..., K]`, K a multiple of 16 up to MAX_K; weight: int8 `[N, K]`; both on 16-byte boundaries;
    absmax: fp32 (or its bits) `[N]`; limit: outlier columns beyond which all columns are multiplied in 16 bits (256
    from GATHER_TOKENS tokens on, and at most) -> `[..., N]`, as `kbit.kernels.triton.llm_int8`."""
    # Every microsecond here is one of an eager call, as in linear_4bit.py.
    n, k = weight.shape
    device, dtype = x.get_device(), x.dtype
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return llm_int8(x, weight, absmax, bias, threshold, config, limit)
    inner, stride = as_rows(x, k)
    m = inner.shape[0]
    fp16, marked = dtype == torch.float16, threshold > 0
    plan = _plan(device, m, n, k, fp16, marked, config)
    launcher, gather = plan.launcher, plan.gather
    out = x.new_empty((*x.shape[:-1], n))
    scratch = torch.empty(plan.size, dtype=torch.uint8, device=x.device)
    codes, of_x, of_w = scratch.data_ptr(), inner.data_ptr(), weight.data_ptr()
    rows = codes + m * k + k + 16
    limit = min(limit, _CAPACITY)
    flags = codes + m * k if marked else 0
    stream = torch._C._cuda_getCurrentRawStream(device)
    quantize_rows(inner, codes, rows, flags, threshold, stream, limit)
    map_a = encode_cached(codes, UINT8, k, m, k, (_BK, _BM), 3)
    map_w = encode_cached(of_w, UINT8, k, n, k, plan.box_w, 3)
    wide_w, wide_x = linear_8bit_wide.tensor_maps(plan.wide, inner, stride, weight)
    rest, sub = 0, 0
    if gather is not None:
        rest, sub = codes + plan.start, codes + plan.start + m * _CAPACITY * 2
        gathered = (of_x, codes, of_w, rows, flags, rest, sub, m, n, k, stride, plan.rows_w)
        with gather.lock:
            _OF_GATHER.pack_into(gather.memory, 0, *gathered)
            gather.start(plan.gather_grid, stream)
    bias_at, workspace, marks = 0 if bias is None else bias.data_ptr(), codes + plan.sums, codes + plan.marks
    pointers = (bias_at, flags, rest, sub, out.data_ptr(), workspace, marks, next(launches))
    sizes = (m, n, k, stride, k, plan.group, limit)
    shares = (plan.workers, 2 * plan.cut.clusters, plan.cut.shared_tiles)
    with launcher.lock:
        for i, tensor_map in enumerate((map_a, map_w, wide_w, wide_x)):
            launcher.pointers[i] = ctypes.addressof(tensor_map)
        values = (of_x, codes, of_w, rows, absmax.data_ptr(), *pointers, *sizes, *shares)
        _POINTERS_AND_SIZES.pack_into(launcher.memory, _FIRST_POINTER, *values)
        launcher.start(plan.grid, stream)
    return out
