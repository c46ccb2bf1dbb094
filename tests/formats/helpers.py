"""What several format tests need: the golden files, a live bitsandbytes, and a slow independent decoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kbit.formats.codebooks import FP4_VALUES, NF4_VALUES

GOLDEN = Path(__file__).parents[1] / "golden"
TABLES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@functools.cache
def bitsandbytes() -> Any:
    """bitsandbytes.functional 0.50, or the test is skipped with the reason."""
    module = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: only golden files are compared")
    if not module.__version__.startswith("0.50."):
        pytest.skip(f"the comparison is with bitsandbytes 0.50, installed is {module.__version__}")
    return module.functional


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's fp32 mean depends on the thread count, and bitsandbytes compiles its fallbacks: one thread, eager."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_num_threads(threads)


def decode_slowly(packed: Tensor, absmax: Tensor, name: str, block_size: int, shape: tuple[int, ...]) -> Tensor:
    """float32 values of packed 4-bit codes, element by element in Python: shares no code with kbit."""
    data, scales = packed.reshape(-1).tolist(), absmax.reshape(-1)
    table = torch.tensor(TABLES[name])
    values = [
        table[(data[i // 2] >> 4) if i % 2 == 0 else (data[i // 2] & 15)] * scales[i // block_size]
        for i in range(math.prod(shape))
    ]
    return torch.stack(values).view(shape) if values else torch.empty(shape)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, the sign of zero and NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.contiguous(), b.contiguous()
    return torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)) if a.numel() else True
