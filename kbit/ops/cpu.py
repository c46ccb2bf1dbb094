"""Operators on CPUs: C++ kernels where this machine has them, else the reference.

Nothing is compiled or loaded until an operator is first called, so that `import kbit` stays cheap. Every function here
gives what its namesake in `reference` gives: codes, scales and decoded values to the bit, products within rounding.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from kbit.ops.schemas import library

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not() -> str | None:
    """None where the native kernels serve, else the reason in one line. Compiles them at the first question."""
    return importlib.import_module("kbit.kernels.cpu.library").why_not()


@functools.cache
def kernels(name: str) -> Any:
    """The launchers of `kbit.kernels.cpu.NAME`, or None where the reference has to serve."""
    return None if why_not() else importlib.import_module(f"kbit.kernels.cpu.{name}")


def reset() -> None:
    """Look for the native library again, after the environment changed: for tests."""
    importlib.import_module("kbit.kernels.cpu.library").reset()
    kernels.cache_clear()


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}

for _name, _function in IMPLEMENTATIONS.items():
    library.impl(_name, _function, "CPU")
