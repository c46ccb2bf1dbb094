"""Launcher of `linear_4bit_grad_input.cu`: the gradient to the input of a 4-bit layer on Hopper."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import threading

import torch
from torch import Tensor

from kbit.formats.codebooks import codebook
from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import stream_k
from kbit.kernels.cuda.linear_4bit import _BFLOAT16, _FLOAT16, _encode_cached, _TensorMap
from kbit.kernels.cuda.stream_k import Schedule, schedule

_THREADS = 384


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the kernel, named as in its source: tokens a tile; stages of inputs and decoded weights, of codes."""

    nt: int
    stages: int = 3
    cs: int = 8

    @property
    def shared_bytes(self) -> int:
        stages = self.stages * (self.nt * 128 + 16384) + self.cs * 4096
        return 1024 + stages + 8192 + 1024 + 4096 + 32768 + 16 * self.stages + 8 * self.cs

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that multiplies, and of one that decodes; all have 168 at entry."""
        return 200, 104


def wgmma_header(nt: int, fp16: bool) -> str:
    """The device function `wgmma` for m64 n`nt` k16, adding to `d`; the left operand lies transposed."""
    count = nt // 2
    outputs = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    kind = "f16" if fp16 else "bf16"
    shape = f"wgmma.mma_async.sync.aligned.m64n{nt}k16.f32.{kind}.{kind}"
    return f"""__device__ __forceinline__ void wgmma(float (&d)[{count}], u64 a, u64 b) {{
  asm volatile("{shape} {{{outputs}}}, %{count}, %{count + 1}, 1, 1, 1, 1, 0;"
    : {operands} : "l"(a), "l"(b));
}}
"""


def settings(config: Config, name: str, dtype: torch.dtype, nested: bool) -> tuple[dict[str, object], dict[str, str]]:
    """(macros, headers) to compile the kernel with."""
    fp16 = dtype == torch.float16
    bits = codebook(name).to(dtype).view(torch.int16).tolist()
    consumer, decoder = config.registers
    macros: dict[str, object] = {
        "FP16": int(fp16),
        "NT": config.nt,
        "STAGES": config.stages,
        "CS": config.cs,
        "NESTED": int(nested),
        "CONSUMER_REGISTERS": consumer,
        "DECODER_REGISTERS": decoder,
        "CODEBOOK": ",".join(str(b & 0xFFFF) for b in bits),
    }
    if nested:
        macros["DYNAMIC_MAP"] = ",".join(f"{float(v).hex()}f" for v in codebook("dynamic8"))
    return macros, {"wgmma.h": wgmma_header(config.nt, fp16)}


class _Arguments(ctypes.Structure):
    """The kernel's parameters, in its order."""

    _fields_ = [
        ("map_x", _TensorMap),
        ("weight", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
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


_lock = threading.Lock()


@functools.cache
def _load(device: int, config: Config, name: str, dtype: torch.dtype, nested: bool) -> compiler.Launcher:
    macros, headers = settings(config, name, dtype, nested)
    code = compiler.cubin("linear_4bit_grad_input", "sm_90a", macros, headers)
    function = compiler.load(code, "linear_4bit_grad_input", config.shared_bytes)
    return compiler.Launcher(function, _Arguments, _THREADS, config.shared_bytes)


def choose_config(m: int) -> Config:
    """Tokens a tile: as few tiles of at most 256 as cover m, of one size."""
    tiles = -(-m // 256)
    nt = max(64, -(-m // tiles // 32) * 32)
    return Config(nt, stages=min(6, 147456 // (nt * 128 + 16384)))


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
) -> tuple[Config, Schedule, compiler.Launcher]:
    """Settings, schedule and loaded kernel of a product on the current device; compiled at first use."""
    config = config or choose_config(m)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    with _lock:
        launcher = _load(device, config, name, dtype, nested)
    return config, schedule(processors, m, k, n, config.nt), launcher


def linear_4bit_grad_input(
    grad: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    name: str,
    block_size: int,
    k: int,
    config: Config | None = None,
    force: Schedule | None = None,
) -> Tensor:
    """grad: bf16 or fp16 `[..., N]`, weight: row layout `[N, K/2]` with K a multiple of the block size (at least 64),
    both from 16-byte boundaries on; N a multiple of 8. -> `[..., K]`: `grad W`."""
    n = grad.shape[-1]
    rows = grad.reshape(-1, n)
    m, device = rows.shape[0], grad.device.index
    stride = rows.stride(0) if m > 1 else n
    if rows.stride(1) != 1 or stride % 8 or stride < n:
        rows, stride = rows.contiguous(), n
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            scales = (absmax, nested_absmax, nested_offset)
            return linear_4bit_grad_input(grad, weight, *scales, name, block_size, k, config, force)
    out = torch.empty((*grad.shape[:-1], k), dtype=grad.dtype, device=grad.device)
    nested = nested_absmax is not None
    config, chosen, launcher = _plan(device, m, n, k, name, grad.dtype, nested, config)
    chosen = force or chosen
    kind = _FLOAT16 if grad.dtype == torch.float16 else _BFLOAT16
    map_x = _encode_cached(rows.data_ptr(), kind, n, m, stride * 2, (64, config.nt // 2), 3)
    size, flags = chosen.workspace(config.nt)
    workspace = torch.empty(size, dtype=torch.uint8, device=grad.device) if size else None
    with launcher.lock:
        values = launcher.values
        values.map_x, values.weight = map_x, weight.data_ptr()
        values.absmax, values.out = absmax.data_ptr(), out.data_ptr()
        values.nested_absmax = None if nested_absmax is None else nested_absmax.data_ptr()
        values.offset = None if nested_offset is None else nested_offset.data_ptr()
        if workspace is not None:
            values.workspace = workspace.data_ptr()
            values.flags = workspace.data_ptr() + flags
            values.launch = next(stream_k.launches)
        values.m, values.n, values.k, values.block_shift = m, n, k, block_size.bit_length() - 1
        values.shared_tiles = chosen.shared_tiles
        launcher.start((2 * chosen.clusters, 1, 1), torch.cuda.current_stream(device).cuda_stream)
    return out
