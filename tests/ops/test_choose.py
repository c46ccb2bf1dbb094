from __future__ import annotations

import pytest

from kbit.ops import backends, choose
from kbit.ops.choose import linear_8bit_path


@pytest.mark.parametrize(
    "device, few", [("cpu", choose.WEIGHT_ONLY_TOKENS), ("cuda", choose.GPU_WEIGHT_ONLY_TOKENS)], ids=["cpu", "cuda"]
)
def test_few_tokens_read_the_weight_alone(device, few):
    assert linear_8bit_path(device, 0) == linear_8bit_path(device, 1) == "weight_only"
    assert linear_8bit_path(device, few) == "weight_only"
    assert linear_8bit_path(device, few + 1) == linear_8bit_path(device, 10**6) == "llm_int8"
    assert linear_8bit_path(device, 1, True) == "llm_int8" and linear_8bit_path(device, 10**6, False) == "weight_only"


def test_int8_kernels_of_a_gpu():
    hopper = (9, 0)
    assert choose.linear_8bit_kernel("weight_only", 1, 4096, 4096, 2, hopper) == "hopper"
    assert choose.linear_8bit_kernel("llm_int8", 4096, 4096, 4096, 2, hopper) == "hopper"
    for path in ("weight_only", "llm_int8"):
        assert choose.linear_8bit_kernel(path, 1, 4096, 4096, 2, (8, 0)) == "triton"
        assert choose.linear_8bit_kernel(path, 1, 4096, 4096, 4, hopper) == "triton"  # fp32 input
        assert choose.linear_8bit_kernel(path, 1, 4096, 4100, 2, hopper) == "triton"  # rows off 16-byte boundaries
        assert choose.linear_8bit_kernel(path, 1, 4096, 65536, 2, hopper) == "triton"
        assert choose.linear_8bit_kernel(path, 1, 4096, 4096, 2, hopper, aligned=False) == "triton"
    for m, kernel in ((64, "hopper"), (65, "hopper_wide"), (4096, "hopper_wide")):
        assert choose.linear_8bit_kernel("weight_only", m, 14336, 4096, 2, hopper) == kernel
    for m, kernel in ((128, "hopper"), (129, "hopper_wide")):
        assert choose.linear_8bit_kernel("weight_only", m, 4096, 4096, 2, hopper) == kernel
    assert choose.linear_8bit_kernel("weight_only", 129, 1024, 4096, 2, hopper) == "dequantize"
    assert choose.linear_8bit_kernel("weight_only", 8192, 4096, 4096, 2, hopper) == "dequantize"
    assert choose.linear_8bit_kernel("weight_only", 4096, 4096, 4096, 2, hopper, aligned=False) == "dequantize"
    assert choose.linear_8bit_grad_path(1) == "triton" and choose.linear_8bit_grad_path(4096) == "dequantize"


def test_the_last_backend_always_works():
    last = backends()[-1]
    assert last.active and last.name == "reference"
    assert all(backend.reason and "\n" not in backend.reason for backend in backends())
