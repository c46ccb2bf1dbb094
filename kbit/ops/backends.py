"""Which backends serve this machine, and why the others do not: what `kbit doctor` prints."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Backend:
    """One family of kernels: its name, whether it is in use here, and the reason in one line."""

    name: str
    active: bool
    reason: str


def backends() -> list[Backend]:
    """Every backend, in the order in which operators prefer them; the last one always works."""
    return [_cuda(), _triton(), _cpu(), Backend("reference", True, "plain torch; serves every device")]


def _has_gpu() -> bool:
    return torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())


def _triton() -> Backend:
    from kbit.ops import triton

    if not _has_gpu():
        return Backend("triton", False, "no GPU that torch can use")
    reason = triton.why_not()
    return Backend("triton", reason is None, reason or "products, quantize and dequantize on every GPU")


def _cuda() -> Backend:
    from kbit.ops import cuda

    reason = cuda.why_not()
    return Backend("cuda", reason is None, reason or "products on Hopper GPUs, compiled at first use")


def _cpu() -> Backend:
    from kbit.kernels.cpu import library
    from kbit.ops import cpu

    reason = cpu.why_not()
    if reason is not None:
        return Backend("native", False, f"{reason}; plain torch serves, slower")
    found = library.library()
    made = "shipped" if found.path.parent == library.build.FOLDER else "compiled on this machine"
    return Backend("native", True, f"C++ kernels for CPUs, instruction set {found.level}, {made}")
