"""Fixture: run a test at every instruction set that this machine has, and with the native library switched off."""

from __future__ import annotations

import pytest

from kbit.kernels.cpu import build, library
from kbit.ops import cpu


@pytest.fixture(params=[*build.levels(), "off"], scope="module")
def level(request):
    """The level in use; operators on CPU tensors run with it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "off":
            patch.setenv("KBIT_NATIVE", "0")
        else:
            patch.setenv("KBIT_CPU_LEVEL", request.param)
        cpu.reset()
        if request.param != "off" and (not library.available() or library.library().level != request.param):
            pytest.skip(f"no {request.param} here: {library.why_not() or 'another CPU'}")
        yield request.param
    cpu.reset()
