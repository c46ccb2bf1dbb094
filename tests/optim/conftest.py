"""Steps that ask for the native library need it: without a compiler, or with KBIT_NATIVE=0, they are skipped."""

from __future__ import annotations

import pytest

from kbit.kernels.cpu import library


@pytest.fixture(autouse=True)
def native_library(request):
    parameters = getattr(request.node, "callspec", None)
    asked = parameters is not None and parameters.params.get("backend") == "native"
    if (asked or request.node.get_closest_marker("native")) and (reason := library.why_not()):
        pytest.skip(f"no native library: {reason}")
