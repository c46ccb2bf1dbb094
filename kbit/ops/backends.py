"""Which backends serve this machine, and why the others do not: what `kbit doctor` prints."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util

import torch


@dataclasses.dataclass(frozen=True)
class Backend:
    """One family of kernels: its name, whether it is in use here, and the reason in one line."""

    name: str
    active: bool
    reason: str


def backends() -> list[Backend]:
    """Every backend, in the order in which operators prefer them; the last one always works."""
    return [_cuda(), _triton(), *_cpu(), Backend("reference", True, "plain torch; serves every device")]


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


def _cpu() -> list[Backend]:
    """The C++ kernels for CPUs speak for themselves, where they are part of this build."""
    if importlib.util.find_spec("kbit.ops.cpu") is None:
        return []
    module = importlib.import_module("kbit.ops.cpu")
    reason = module.why_not()
    return [Backend("cpu", reason is None, reason or "C++ kernels for this CPU")]
