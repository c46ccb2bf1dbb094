from __future__ import annotations

import pytest

from kbit.ops import backends
from kbit.ops.choose import WEIGHT_ONLY_TOKENS, linear_8bit_path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_few_tokens_read_the_weight_alone(device):
    assert linear_8bit_path(device, 0) == linear_8bit_path(device, 1) == "weight_only"
    assert linear_8bit_path(device, WEIGHT_ONLY_TOKENS) == "weight_only"
    assert linear_8bit_path(device, WEIGHT_ONLY_TOKENS + 1) == linear_8bit_path(device, 10**6) == "llm_int8"


def test_the_last_backend_always_works():
    last = backends()[-1]
    assert last.active and last.name == "reference"
    assert all(backend.reason and "\n" not in backend.reason for backend in backends())
