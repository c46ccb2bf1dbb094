"""Launcher of `quantize_4bit.cu`: whole blocks of 32 to 256 values, contiguous, from a 16-byte boundary on."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kbit.formats.blocks import TINY_ABSMAX
from kbit.kernels.cuda import compile as compiler
from kbit.kernels.triton.quantize_4bit import bins

_THREADS = 256
_VALUES = _THREADS * 64  # that a thread block quantizes
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Arguments(ctypes.Structure):
    """The kernel's parameters, in its order."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("octets", ctypes.c_longlong),
    ]


def fits(x: Tensor, block_size: int) -> bool:
    """Whether the kernel can quantize this tensor."""
    return (
        x.dtype in _KINDS
        and 32 <= block_size <= 256
        and 0 < x.numel()
        and x.numel() % block_size == 0
        and x.is_contiguous()
        and x.data_ptr() % 16 == 0
    )


def settings(name: str, dtype: torch.dtype, block_size: int) -> dict[str, object]:
    """The macros to compile the kernel with."""
    midpoints, codes = bins(name)
    return {
        "KIND": _KINDS[dtype],
        "LANES": block_size // 8,
        "TINY": f"{TINY_ABSMAX}f",
        "MIDPOINTS": ",".join(str(bits & 0xFFFFFFFF) for bits in midpoints.view(torch.int32).tolist()),
        "CODES": ",".join(map(str, codes.tolist())),
    }


@compiler.once
def _load(device: int, name: str, dtype: torch.dtype, block_size: int) -> compiler.Launcher:
    code = compiler.cubin("quantize_4bit", "sm_90a", settings(name, dtype, block_size), {})
    return compiler.Launcher(compiler.load(code, "quantize_4bit", 0), _Arguments, _THREADS, 0)


def quantize_4bit(x: Tensor, name: str, block_size: int) -> tuple[Tensor, Tensor]:
    """x: any shape that `fits` -> packed uint8 `[n / 2]`, absmax fp32 `[n / block_size]`."""
    device = x.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return quantize_4bit(x, name, block_size)
    count = x.numel()
    packed = torch.empty(count // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(count // block_size, dtype=torch.float32, device=x.device)
    launcher = _load(device, name, x.dtype, block_size)
    with launcher.lock:
        values = launcher.values
        values.x, values.packed, values.absmax = x.data_ptr(), packed.data_ptr(), absmax.data_ptr()
        values.octets = count // 8
        launcher.start((-(-count // _VALUES), 1, 1), torch.cuda.current_stream(device).cuda_stream)
    return packed, absmax
