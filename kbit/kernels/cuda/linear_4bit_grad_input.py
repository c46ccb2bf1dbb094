"""Launcher of `linear_4bit_grad_input.cu`: the gradient to the input of a 4-bit layer on Hopper."""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import stream_k
from kbit.kernels.cuda.operands import TensorMap, as_rows, encode_cached, half_kind, table_macros
from kbit.kernels.cuda.stream_k import Schedule, schedule, tokens_a_tile

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
    consumer, decoder = config.registers
    macros: dict[str, object] = {
        "FP16": int(fp16),
        "NT": config.nt,
        "STAGES": config.stages,
        "CS": config.cs,
        "CONSUMER_REGISTERS": consumer,
        "DECODER_REGISTERS": decoder,
        **table_macros(name, dtype, nested),
    }
    return macros, {"wgmma.h": wgmma_header(config.nt, fp16)}


class _Arguments(ctypes.Structure):
    """The kernel's parameters, in its order."""

    _fields_ = [
        ("map_x", TensorMap),
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


@compiler.once
def _load(device: int, config: Config, name: str, dtype: torch.dtype, nested: bool) -> compiler.Launcher:
    macros, headers = settings(config, name, dtype, nested)
    code = compiler.cubin("linear_4bit_grad_input", "sm_90a", macros, headers)
    function = compiler.load(code, "linear_4bit_grad_input", config.shared_bytes)
    return compiler.Launcher(function, _Arguments, _THREADS, config.shared_bytes)


def choose_config(m: int) -> Config:
    nt = tokens_a_tile(m)
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
    rows, stride = as_rows(grad, n)
    m, device = rows.shape[0], grad.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            scales = (absmax, nested_absmax, nested_offset)
            return linear_4bit_grad_input(grad, weight, *scales, name, block_size, k, config, force)
    out = torch.empty((*grad.shape[:-1], k), dtype=grad.dtype, device=grad.device)
    nested = nested_absmax is not None
    config, chosen, launcher = _plan(device, m, n, k, name, grad.dtype, nested, config)
    chosen = force or chosen
    map_x = encode_cached(rows.data_ptr(), half_kind(grad.dtype), n, m, stride * 2, (64, config.nt // 2), 3)
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
