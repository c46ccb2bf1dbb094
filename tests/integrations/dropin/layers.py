"""Small layers of the drop-in that its tests share."""

from __future__ import annotations

import pytest

from kbit.integrations.bitsandbytes.linear import Linear4bit, Linear8bitLt


def nf4(k: int = 128, n: int = 32, **kwargs) -> Linear4bit:  # type: ignore[no-untyped-def]
    return Linear4bit(k, n, quant_type="nf4", **kwargs)


def int8(k: int = 128, n: int = 32, **kwargs) -> Linear8bitLt:  # type: ignore[no-untyped-def]
    return Linear8bitLt(k, n, has_fp16_weights=False, **kwargs)


MAKERS = {"4bit": nf4, "8bit": int8}
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
