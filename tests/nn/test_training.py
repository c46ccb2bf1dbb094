"""SwitchBackLinear: products and gradients near those of the floating point layer, and a training that learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbit
from kbit.formats import blocks


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("int8_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [4, 90])
def test_product_and_gradients(m, dtype, int8_gradient):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, dtype=dtype)
    layer = kbit.SwitchBackLinear.from_linear(linear, int8_gradient=int8_gradient)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    x = torch.randn(2, m // 2, 64).to(dtype)
    grad = torch.randn(2, m // 2, 48).to(dtype)
    found = []
    for module in (linear, layer):
        own = x.clone().requires_grad_()
        out = module(own)
        out.backward(grad)
        found.append((out.detach(), own.grad, module.weight.grad.clone(), module.bias.grad.clone()))
        module.zero_grad()
    for (actual, expected), limit in zip(zip(found[1], found[0], strict=True), (0.02, 0.02, 6e-3, 6e-3), strict=True):
        assert actual.dtype == dtype and relative(actual, expected) < limit
    codes, absmax = blocks.quantize_int8(linear.weight)
    if not int8_gradient:  # exactly the product with the decoded weight
        expected = grad.double() @ blocks.dequantize_int8(codes, absmax, dtype).double()
        assert relative(found[1][1], expected) < 6e-3


def test_without_gradient_frozen_and_wrong_input():
    layer = kbit.SwitchBackLinear(32, 8)
    with torch.no_grad():
        assert not layer(torch.randn(40, 32)).requires_grad
    layer.requires_grad_(False)
    assert not layer(torch.randn(40, 32)).requires_grad
    x = torch.randn(40, 32, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad.isfinite().all()
    with pytest.raises(ValueError, match="32 features"):
        layer(torch.randn(2, 31))


def test_a_state_dict_of_a_linear_layer():
    linear, layer = nn.Linear(16, 4), kbit.SwitchBackLinear(16, 4)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight) and "int8_gradient=True" in repr(layer)


def test_it_learns():
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(256, 32)
    y = target(x).detach()
    model = nn.Sequential(kbit.SwitchBackLinear(32, 64), nn.ReLU(), kbit.SwitchBackLinear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
