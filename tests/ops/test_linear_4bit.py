"""The 4-bit product and its gradients against the dequantized weight in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from kbit import ops
from tests.ops.helpers import FOUR_BIT, close, weight_4bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
X_SHAPES = [(3, 64), (64,), (2, 5, 64), (0, 64), (2, 0, 64), (1, 1, 1, 64), (130, 64)]


def call(x, parts, bias=None, label="nf4", n=8, block_size=64):
    return ops.linear_4bit(x, *parts, bias, label[:3], block_size, n)


@pytest.mark.parametrize("label", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", X_SHAPES)
def test_forward_and_gradients(label, dtype, shape):
    parts, w = weight_4bit(8, 64, label)
    w = w.to(dtype).double()  # the operator multiplies with the weight dequantized to x's dtype
    x = torch.randn(shape).to(dtype).requires_grad_()
    bias = torch.randn(8).to(dtype).requires_grad_()
    out = call(x, parts, bias, label)
    assert out.dtype == dtype and out.shape == (*shape[:-1], 8)
    close(out.detach(), x.detach().double() @ w.T + bias.detach().double())
    grad = torch.randn_like(out)
    out.backward(grad)
    assert x.grad.dtype == bias.grad.dtype == dtype
    close(x.grad, grad.double() @ w)
    close(bias.grad, grad.double().reshape(-1, 8).sum(0))


@pytest.mark.parametrize(
    "n, k, block_size", [(7, 33, 64), (5, 1, 32), (1, 63, 64), (3, 96, 64), (4, 4096, 4096), (0, 64, 64)]
)
@pytest.mark.parametrize("label", FOUR_BIT)
def test_odd_shapes(label, n, k, block_size):
    parts, w = weight_4bit(n, k, label, block_size)
    x = torch.randn(3, k, requires_grad=True)
    out = call(x, parts, None, label, n, block_size)
    close(out.detach(), x.detach().double() @ w.double().T)
    out.sum().backward()
    close(x.grad, torch.ones(3, n, dtype=torch.float64) @ w.double())


def test_layout_of_input_and_gradient_does_not_matter():
    parts, w = weight_4bit(8, 64)
    x = torch.randn(64, 6).t().requires_grad_()
    close(call(x, parts).detach(), x.detach().double() @ w.double().T)
    for grad in (torch.randn(8, 6).t(), torch.ones(1, 1).expand(6, 8), torch.randn(12, 8)[::2]):
        x.grad = None
        call(x, parts).backward(grad)
        close(x.grad, grad.double() @ w.double())
    wide = torch.randn(2, 3, 64).transpose(0, 1)
    close(call(wide, parts), wide.double() @ w.double().T)


@pytest.mark.parametrize("label", FOUR_BIT)
def test_gradcheck(label):
    parts, _ = weight_4bit(3, 11, label, 32)
    x = torch.randn(2, 1, 11, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    function = lambda x, bias: call(x, parts, bias, label, 3, 32)  # noqa: E731
    assert gradcheck(function, (x, bias))
    assert gradgradcheck(function, (x, bias))
    assert gradgradcheck(lambda x: call(x, parts, None, label, 3, 32).pow(3), (x,))


def test_bias_alone_and_input_alone():
    parts, w = weight_4bit(8, 64)
    x, bias = torch.randn(4, 64), torch.randn(8, requires_grad=True)
    call(x, parts, bias).sum().backward()
    assert bias.grad.tolist() == [4.0] * 8
    x.requires_grad_()
    call(x, parts, bias.detach()).sum().backward()
    close(x.grad, torch.ones(4, 8, dtype=torch.float64) @ w.double())


def test_no_graph_where_no_gradient_is_needed():
    parts, _ = weight_4bit(8, 64)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.no_grad():
        assert not call(x, parts).requires_grad
    assert not call(x.detach(), parts).requires_grad
    with torch.inference_mode():
        assert call(x, parts).is_inference()


def test_bias_of_another_dtype_is_cast():
    parts, _ = weight_4bit(8, 64)
    bias = torch.randn(8, requires_grad=True)
    out = call(torch.randn(4, 64).bfloat16(), parts, bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert bias.grad.dtype == torch.float32


def test_integers_are_refused():
    parts, _ = weight_4bit(8, 64)
    for dtype in (torch.long, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"floating point input of 16 bits or more, got {dtype}"):
            call(torch.ones(4, 64).to(dtype), parts)


def test_features_that_do_not_fit_are_refused():
    """Packed bytes of another K would decode to something."""
    parts, _ = weight_4bit(8, 64)
    for k in (32, 63, 128):
        with pytest.raises((ValueError, RuntimeError)):
            call(torch.randn(4, k), parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    parts, w = weight_4bit(8, 64)
    x = torch.randn(4, 64, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    linear = torch.nn.functional.linear
    with torch.autocast("cpu", dtype=dtype):
        out = call(x, parts, bias)
        expected = linear(x, w, bias)
        assert out.dtype == expected.dtype == dtype
        assert call(x.double(), parts).dtype == linear(x.double(), w.double()).dtype  # autocast leaves float64 alone
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and bias.grad.dtype == torch.float32
    close(x.grad, torch.ones(4, 8, dtype=torch.float64) @ w.to(dtype).double(), dtype)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    parts, w = weight_4bit(64, 64)
    x = torch.randn(4, 64, requires_grad=True)

    def block(x):
        return call(torch.tanh(call(x, parts, None, "nf4", 64)), parts, None, "nf4", 64)

    plain = torch.autograd.grad(block(x).square().sum(), x)[0]
    out = checkpoint(block, x, use_reentrant=reentrant)
    out.square().sum().backward()
    assert torch.equal(x.grad, plain)


def test_recycled_buffers_are_noticed():
    """Codes on ctx instead of in saved tensors would give wrong gradients in silence (bitsandbytes #2034)."""
    for index, form in ((0, "nf4"), (1, "nf4-plain"), (1, "nf4"), (2, "nf4"), (3, "nf4")):
        parts, _ = weight_4bit(8, 64, form)
        x = torch.randn(4, 64, requires_grad=True)
        out = call(x, parts)
        parts[index].fill_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_saved_tensor_hooks_see_the_codes():
    parts, _ = weight_4bit(8, 64)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.dtype), t)[1], lambda t: t):
        call(torch.randn(4, 64, requires_grad=True), parts).sum()
    assert seen == [torch.uint8]


def test_fp32_scales_and_their_bits_are_the_same():
    torch.manual_seed(3)
    parts, _ = weight_4bit(8, 64, bits=True)
    torch.manual_seed(3)
    floats, _ = weight_4bit(8, 64, bits=False)
    x = torch.randn(4, 64)
    assert torch.equal(call(x, parts), call(x, floats))


def test_a_compiler_of_backward_passes_traces_the_rules():
    """Version counters are not looked at there: reading them would break its graph at every layer."""
    from torch._dynamo import compiled_autograd
    from torch._dynamo.utils import counters

    parts, w = weight_4bit(8, 64)
    x = torch.randn(4, 64, requires_grad=True)
    counters.clear()
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        call(x, parts).sum().backward()
    assert not counters["graph_break"]
    close(x.grad, torch.ones(4, 8, dtype=torch.float64) @ w.double(), torch.float32)


def test_gpu_operators_refuse_shapes_that_do_not_fit():
    from kbit.ops import triton

    parts, _ = weight_4bit(8, 64, "nf4-plain")
    x = torch.randn(2, 64)
    for wrong in ((torch.randn(2, 128), *parts), (x, parts[0], parts[1][:-1], *parts[2:])):
        with pytest.raises(RuntimeError, match="a 4-bit weight"):
            triton.linear_4bit(*wrong, None, "nf4", 64, 8)
    with pytest.raises(RuntimeError, match="takes a bias"):
        triton.linear_4bit_group(x, [parts[0]], [parts[1]], [None], [None], [torch.zeros(7)], "nf4", 64, [8])
    codes, scales = torch.zeros(8, 64, dtype=torch.int8), torch.ones(8)
    for wrong in ((torch.randn(2, 128), codes, scales, None), (x, codes, scales[:7], None), (x, codes, scales, x[0])):
        with pytest.raises(RuntimeError, match=r"features|scales|bias"):
            triton.linear_8bit(*wrong, 6.0)
