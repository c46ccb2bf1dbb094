"""torch.compile(fullgraph=True) of the products: static and dynamic shapes, gradients, outliers."""

from __future__ import annotations

import shutil

import pytest
import torch

from kbit import ops
from tests.ops.helpers import close, weight_4bit, weight_8bit


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("label", ["nf4", "fp4-plain"])
def test_linear_4bit_dynamic(label):
    parts, w = weight_4bit(8, 64, label)

    def function(x, bias):
        return ops.linear_4bit(x, *parts, bias, label[:3], 64, 8) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 5, 130):
        x = torch.randn(m, 64, requires_grad=True)
        bias = torch.randn(8, requires_grad=True)
        out = compiled(x, bias)
        assert torch.equal(out, function(x, bias))
        out.sum().backward()
        close(x.grad, torch.full((m, 8), 2.0, dtype=torch.float64) @ w.double())
        assert bias.grad.tolist() == [2.0 * m] * 8


def test_linear_8bit_dynamic_with_outliers():
    parts, w = weight_8bit(9, 48)

    def function(x):
        return ops.linear_8bit(x, *parts, None, 6.0) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (4, 30, 70):
        x = torch.randn(m, 48)
        x[1, 5], x[2, 7] = 30.0, -8.0
        x.requires_grad_()
        out = compiled(x)
        assert torch.equal(out, function(x))
        out.sum().backward()
        close(x.grad, torch.ones(m, 9, dtype=torch.float64) @ w.double())


def test_one_graph_serves_all_token_counts():
    parts, _ = weight_8bit(9, 48)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: ops.linear_8bit(x, *parts, None, 6.0), backend=counter, dynamic=True)
    for m in (3, 8, 40, 100):  # on both sides of the switch between the two paths
        compiled(torch.randn(m, 48))
    assert counter.frame_count == 1


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor():
    """The default backend, once for each product, forward and backward."""
    four, _ = weight_4bit(8, 64)
    eight, _ = weight_8bit(8, 8)

    def function(x):
        return ops.linear_8bit(torch.relu(ops.linear_4bit(x, *four, None, "nf4", 64, 8)), *eight, None, 6.0).sum()

    x = torch.randn(20, 64, requires_grad=True)
    expected = torch.autograd.grad(function(x), x)[0]
    actual = torch.autograd.grad(torch.compile(function, fullgraph=True)(x), x)[0]
    torch.testing.assert_close(actual, expected)
