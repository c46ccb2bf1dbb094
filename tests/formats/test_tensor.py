"""`kbit.quantize`, `QuantizedTensor` and `kbit.dequantize`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kbit
from kbit.formats.tensor import dequantize_reference
from tests.formats.helpers import same
from tests.formats.test_spec import formats, shapes

NAMES = ("nf4", "fp4", "nf4-plain", "fp4-plain", "int8", "dynamic8", "dynamic8-unsigned")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@settings(deadline=None, max_examples=80)
@given(fmt=formats(), shape=shapes, dtype=st.sampled_from(DTYPES))
def test_shape_dtype_and_values_come_back(fmt, shape, dtype):
    if fmt.name == "int8" and not shape:
        return
    x = torch.rand(shape).to(dtype)
    q = kbit.quantize(x, fmt)
    back = q.dequantize()
    assert back.shape == x.shape and back.dtype == dtype and q.dtype == dtype and q.shape == x.shape
    assert same(back, kbit.dequantize(q)) and same(back, dequantize_reference(q, dtype))
    assert q.dequantize(torch.float32).dtype == torch.float32
    if x.numel():
        assert (back.double() - x.double()).abs().max() <= {4: 0.22, 8: 0.03}[fmt.bits]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_has_the_size_of_the_format(name, dtype):
    """Relative error of Gaussian weights, as published: NF4 9.2%, FP4 more, 8 bits about 1%."""
    x = torch.randn(64, 512)
    x = (x.abs() if name == "dynamic8-unsigned" else x).to(dtype)
    error = float((kbit.quantize(x, name).dequantize().double() - x.double()).norm() / x.double().norm())
    low, high = {"nf4": (0.088, 0.096), "fp4": (0.105, 0.135), "int8": (0.005, 0.01), "dyna": (0.005, 0.02)}[
        name.split("-")[0][:4]
    ]
    assert low < error < high


def test_defaults_of_the_names():
    x = torch.randn(8, 128)
    assert kbit.quantize(x).format == kbit.Format("nf4", 64, True)
    assert kbit.quantize(x, "nf4", block_size=32, double_quant=False).format == kbit.Format("nf4", 32)
    assert kbit.quantize(x, "dynamic8").format == kbit.Format("dynamic8", 256)
    assert kbit.quantize(x, kbit.Format("fp4", 128)).format == kbit.Format("fp4", 128)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad, word", [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")])
def test_not_finite_is_refused_by_name(name, dtype, bad, word):
    x = torch.ones(3, 70, dtype=dtype)
    x[2, 5] = bad
    x[2, 6] = bad
    with pytest.raises(ValueError, match=rf"tensor 'layer.0.weight' holds 2 values.*first: {word} at \[2, 5\]"):
        kbit.quantize(x, name, name="layer.0.weight")


def test_beyond_fp32_is_refused():
    with pytest.raises(ValueError, match=r"first: -1e\+60, infinity in fp32, at \[1\]"):
        kbit.quantize(torch.tensor([1.0, -1e60], dtype=torch.float64))
    tiny = kbit.quantize(torch.tensor([1.0, 1e-60], dtype=torch.float64), "nf4-plain").dequantize()
    assert tiny.tolist() == [1.0, 0.0]


def test_refusals():
    with pytest.raises(TypeError, match="dtype torch.int64"):
        kbit.quantize(torch.arange(4))
    with pytest.raises(TypeError, match="float8"):
        kbit.quantize(torch.ones(4).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="meta device"):
        kbit.quantize(torch.ones(4, device="meta"))
    with pytest.raises(ValueError, match="scalar"):
        kbit.quantize(torch.tensor(1.0), "int8")
    with pytest.raises(ValueError, match="negative values"):
        kbit.quantize(torch.tensor([1.0, -1e-9]), "dynamic8-unsigned")
    with pytest.raises(ValueError, match="belong to the Format"):
        kbit.quantize(torch.ones(4), kbit.Format(), block_size=64)
    with pytest.raises(ValueError, match="unknown format"):
        kbit.quantize(torch.ones(4), "q4_k")


@pytest.mark.parametrize("name", NAMES)
def test_input_is_left_alone_and_layout_does_not_matter(name):
    x = torch.rand(96, 64, requires_grad=True)
    before = x.detach().clone()
    q = kbit.quantize(x.t(), name)
    assert torch.equal(x.detach(), before) and not q.dequantize().requires_grad
    reference = kbit.quantize(before.t().contiguous(), name)
    for part, tensor in q.tensors().items():
        assert tensor.is_contiguous() and same(tensor, reference.tensors()[part])


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_lossless(name):
    q = kbit.quantize(torch.rand(5, 64), name)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.to("cpu")):
        assert other.format == q.format and other.shape == q.shape and other.dtype == q.dtype
        assert all(same(tensor, other.tensors()[part]) for part, tensor in q.tensors().items())
    assert q.device == torch.device("cpu")
    assert q == q and q != copy.deepcopy(q)  # identity: comparing tensors has no single answer
    with pytest.raises(TypeError):
        q.to(torch.float16)  # type: ignore[arg-type]


def test_in_inference_mode():
    """What is quantized there serves training later."""
    with torch.inference_mode():
        q = kbit.quantize(torch.rand(4, 64))
    assert not any(tensor.is_inference() for tensor in q.tensors().values())


@pytest.mark.parametrize("name", NAMES)
def test_bf16_keeps_fp32_scales(name):
    """Scales never pass through the weight's dtype."""
    x = torch.rand(4, 256).bfloat16()
    exact = kbit.quantize(x.float(), name)
    q = kbit.quantize(x, name)
    assert all(same(tensor, exact.tensors()[part]) for part, tensor in q.tensors().items())
