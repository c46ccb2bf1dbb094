"""Linear4bit and Linear8bit as modules: forward, gradients, construction, compilation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbit
from tests.nn.helpers import DTYPES, LABELS, bits_of, empty_linear, linear, reference, same


def close(out, expected, label, dtype):
    """Kernels multiply int8 codes and scale the sum: the weight is not rounded to `dtype`."""
    rounding = torch.finfo(dtype).eps * expected.abs().max().item() if label == "int8" else 0.0
    rtol = max(torch.finfo(dtype).eps * 2, 1.3e-6)
    torch.testing.assert_close(out, expected, rtol=rtol, atol=max(rounding, 1e-5))


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_dequantized_linear(label, dtype, bias):
    layer = linear(label, bias=bias, dtype=dtype)
    plain = reference(layer)
    x = torch.randn(2, 3, 64).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out, expected = layer(x), plain(y)
    assert out.dtype == dtype
    close(out, expected, label, dtype)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    assert layer.weight.grad is None and not layer.weight.requires_grad
    if bias:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("label", LABELS)
def test_many_tokens(label):
    layer = linear(label, 32, 128)
    x = torch.randn(200, 128)
    error = (layer(x) - reference(layer)(x)).norm() / reference(layer)(x).norm()
    assert error < (0.02 if label == "int8" else 1e-6)  # int8 quantizes the activations above a few tokens


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("n, k", [(7, 33), (1, 1), (5, 100), (3, 64)])
def test_odd_shapes(label, n, k):
    layer = linear(label, n, k)
    x = torch.randn(4, k)
    torch.testing.assert_close(layer(x), reference(layer)(x))
    assert layer.dequantize().shape == (n, k)
    assert layer.nbytes == layer.weight_format.nbytes((n, k))


@pytest.mark.parametrize("label", LABELS)
def test_parameters_are_frozen_integers(label):
    layer = linear(label, 16, 128)
    expected = {"weight": (torch.uint8, (16, 64)), "absmax": (torch.int32, (16, 2))}
    if label == "int8":
        expected = {"weight": (torch.int8, (16, 128)), "absmax": (torch.int32, (16,))}
    elif not label.endswith("-plain"):
        expected["absmax"] = (torch.uint8, (16, 2))
        expected |= {"nested_absmax": (torch.int32, (1,)), "nested_offset": (torch.int32, (1,))}
    state = layer.state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items() if k != "bias"} == expected
    assert list(state) == [*expected, "bias"]
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("label", LABELS)
def test_from_linear_shares_the_bias_and_leaves_the_source_alone(label):
    source = nn.Linear(64, 8)
    before = source.weight.detach().clone()
    make = kbit.Linear8bit.from_linear if label == "int8" else lambda m: kbit.Linear4bit.from_linear(m, label)
    layer = make(source)
    assert layer.bias is source.bias and same(source.weight.detach(), before)
    assert same(layer.dequantize(), kbit.quantize(before, kbit.Format.parse(label)).dequantize())


def test_wrong_features_are_refused():
    """Packed bytes of another K would decode to something: bitsandbytes-like silence is not an option."""
    for label in LABELS:
        for k in (32, 63, 128):
            with pytest.raises(ValueError, match="input of 64 features"):
                linear(label)(torch.randn(4, k))
    with pytest.raises(ValueError, match="input of 63 features"):
        linear("nf4", 1, 63)(torch.randn(2, 64))  # 63 and 64 pack into the same number of bytes


def test_wrong_format_for_the_class():
    with pytest.raises(ValueError, match="use Linear8bit for int8"):
        kbit.Linear4bit(64, 8, format="int8")
    with pytest.raises(ValueError, match="unknown format"):
        kbit.Linear4bit(64, 8, format="nf3")


@pytest.mark.parametrize("label", LABELS)
def test_new_layers_hold_zeros(label):
    layer = empty_linear(label)
    assert (layer.dequantize() == 0).all() and (layer(torch.randn(2, 64)) == 0).all()


@pytest.mark.parametrize("label", LABELS)
def test_meta_and_to_empty(label):
    layer = empty_linear(label, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in layer.parameters()) and layer.bias.dtype == torch.bfloat16
    assert layer(torch.empty(2, 64, device="meta", dtype=torch.bfloat16)).shape == (2, 8)
    with torch.device("meta"):
        assert empty_linear(label).weight.is_meta
    source = linear(label, dtype=torch.bfloat16)
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    assert bits_of(layer) == bits_of(source)
    assigned = empty_linear(label, device="meta", dtype=torch.bfloat16)
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert bits_of(assigned) == bits_of(source) and not assigned.weight.requires_grad


@pytest.mark.parametrize("label", LABELS)
def test_compute_dtype(label):
    layer = linear(label)
    layer.compute_dtype = torch.bfloat16
    x = torch.randn(3, 64)
    out = layer(x)
    assert out.dtype == torch.float32
    expected = nn.functional.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16()).float()
    close(out, expected, label, torch.bfloat16)
    plain = linear(label)
    assert plain(x.bfloat16()).dtype == torch.bfloat16  # no silent detour


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -1.0, "6", None, True])
def test_a_threshold_that_does_not_exist(threshold):
    for make in (kbit.Linear8bit.from_linear, kbit.SwitchBackLinear.from_linear):
        with pytest.raises(ValueError, match="outlier_threshold must be a finite number of at least 0, got"):
            make(nn.Linear(64, 8), outlier_threshold=threshold)


@pytest.mark.parametrize("activations", ["no", 1, 0.0])
def test_int8_activations_are_true_false_or_none(activations):
    with pytest.raises(ValueError, match="int8_activations must be True, False or None, got"):
        kbit.Linear8bit.from_linear(nn.Linear(64, 8), int8_activations=activations)


def test_representation():
    assert repr(linear("nf4")) == "Linear4bit(in_features=64, out_features=8, bias=True, nf4, block_size=64)"
    layer = kbit.Linear8bit(64, 8, False, outlier_threshold=4.5, compute_dtype=torch.float16)
    assert "bias=False, int8" in repr(layer) and "outlier_threshold=4.5" in repr(layer)
    assert "compute_dtype=torch.float16" in repr(layer)


@pytest.mark.parametrize("label", LABELS)
def test_quantize_from_checks(label):
    layer = empty_linear(label)
    with pytest.raises(ValueError, match=r"stores a weight \[8, 64\], got \[64, 8\]"):
        layer.quantize_from(torch.randn(64, 8))
    bad = torch.randn(8, 64)
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="'head.weight'.*NaN"):
        layer.quantize_from(bad, "head.weight")
    assert (layer.dequantize() == 0).all()  # nothing changed


@pytest.mark.parametrize("label", LABELS)
def test_set_parts_checks(label):
    layer, other = empty_linear(label), linear(label, 16)
    with pytest.raises(ValueError, match="weight must be torch"):
        layer.set_parts(other.parts())
    with pytest.raises(ValueError, match="has the parts"):
        layer.set_parts({"weight": layer.weight})


@pytest.mark.parametrize("label", LABELS)
def test_compile_fullgraph(label):
    torch._dynamo.reset()
    model = nn.Sequential(linear(label, 64, 64), nn.ReLU(), linear(label, 8, 64))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 40):
        x = torch.randn(m, 64) * 4
        y = x.clone().requires_grad_()
        x.requires_grad_()
        torch.testing.assert_close(compiled(x), model(y))
        compiled(x).sum().backward()
        model(y).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch._dynamo.reset()


def test_autocast_follows_torch():
    layer = linear("nf4")
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == reference(layer)(x).dtype == torch.bfloat16


def test_training_an_adapter_beside_it():
    """A LoRA pair on a frozen 4-bit layer learns; the codes never move."""
    layer = linear("nf4", 64, 64)
    before = bits_of(layer)
    a, b = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
    nn.init.zeros_(b.weight)
    target = torch.randn(64, 64)
    optimizer = torch.optim.Adam([*a.parameters(), *b.parameters()], lr=5e-2)
    x = torch.randn(256, 64)
    losses = []
    for _ in range(30):
        loss = (layer(x) + b(a(x)) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and bits_of(layer) == before


@pytest.mark.parametrize("kind", [kbit.Linear4bit, kbit.Linear8bit, kbit.SwitchBackLinear])
def test_only_floating_point_linear_layers_are_quantized(kind):
    """Codes taken for weights would give garbage."""
    plain = torch.nn.Linear(64, 32)
    for wrong in (
        kbit.Linear8bit.from_linear(plain),
        kbit.Linear4bit.from_linear(plain),
        torch.nn.Conv2d(1, 1, 1),
        None,
    ):
        with pytest.raises(TypeError, match="floating point weight"):
            kind.from_linear(wrong)
