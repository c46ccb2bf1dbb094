"""Where the checks of this folder run: on the CPU through Triton's interpreter, or on the GPU.

They are not collected with the suite: `test_triton.py` runs each file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


if INTERPRETED:
    from tests.triton_interpreter import mend

    mend()


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output that a launcher allocates starts as NaN, 0xAB or 0x55: an element nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
        out = empty(*args, **kwargs)
        if out.is_floating_point():
            return out.fill_(float("nan"))
        return out.fill_(0x55 if out.dtype == torch.int8 else 0xAB)

    monkeypatch.setattr(torch, "empty", poisoned)
