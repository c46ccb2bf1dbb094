"""Products over experts in plain torch: against float64, their gradients, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from kbit import ops
from kbit.nn.experts import experts_forward
from tests.ops.helpers import weight_4bit, weight_8bit

# S rows; where the rows of each of three experts end: spread, empty experts, rows of no expert, nobody's rows, no rows.
ROUTINGS = [(9, (2, 5, 9)), (9, (0, 9, 9)), (9, (0, 4, 4)), (5, (0, 0, 0)), (0, (0, 0, 0))]
SIZES = [(8, 64), (6, 96), (7, 33), (5, 64)]  # N, K: rows of whole blocks; blocks across rows, experts, bytes; N odd


def expert_of(rows: int, ends: tuple[int, ...]) -> list[int]:
    return [sum(end <= row for end in ends) for row in range(rows)]


def weights(kind: str, n: int, k: int):
    """(call, W [E, N, K] float64): call(x, offsets, bias) multiplies by three experts."""
    if kind == "int8":
        (codes, absmax), w = weight_8bit(3 * n, k)
        parts = (codes.view(3, n, k), absmax.view(3, n))
        return lambda x, offsets, bias: ops.experts_8bit(x, offsets, *parts, bias), w.view(3, n, k).double()
    parts, w = weight_4bit(3 * n, k, kind)

    def call(x, offsets, bias):
        return ops.experts_4bit(x, offsets, *parts, bias, kind[:3], 64, n)

    return call, w.view(3, n, k).double()


def expected(x, ends, w, bias):
    """Row by row in float64."""
    out = x @ w[0].t() * 0 + (0 if bias is None else bias.sum() * 0)  # zeros, in the graph of x and bias
    for row, expert in enumerate(expert_of(x.shape[0], ends)):
        if expert < w.shape[0]:
            out[row] = w[expert] @ x[row] + (0 if bias is None else bias[expert])
    return out


@pytest.mark.parametrize("kind", ["nf4", "fp4-plain", "int8"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_forward_and_gradients(kind, size, routing):
    (n, k), (rows, ends) = size, routing
    call, w = weights(kind, n, k)
    offsets = torch.tensor(ends, dtype=torch.int32)
    x = torch.randn(rows, k, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    out = call(x, offsets, bias)
    twin, twin_bias = (t.detach().clone().requires_grad_() for t in (x, bias))
    exact = expected(twin, ends, w, twin_bias)
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)  # float64 input decodes from fp32 values
    grad = torch.randn_like(out)
    ours, theirs = torch.autograd.grad(out, (x, bias), grad), torch.autograd.grad(exact, (twin, twin_bias), grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_second_derivatives(kind):
    call, _ = weights(kind, 3, 64)
    offsets = torch.tensor([1, 1, 4], dtype=torch.int32)
    x = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: call(x, offsets, None).pow(3), (x,), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    for kind in ("nf4", "int8"):
        call, w = weights(kind, 8, 64)
        x = torch.randn(6, 64).to(dtype)
        out = call(x, torch.tensor([2, 2, 6], dtype=torch.int32), None)
        assert out.dtype == dtype
        exact = expected(x.double(), (2, 2, 6), w, None)
        assert (out.double() - exact).norm() < (1e-6 if dtype == torch.float32 else 6e-3) * exact.norm()


def test_what_does_not_fit_is_refused_when_traced():
    parts, _ = weight_4bit(24, 64)
    meta = [t if t is None else t.to("meta") for t in parts]
    x, offsets = torch.empty(4, 64, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    call = torch.ops.kbit.experts_4bit
    assert call(x, offsets, *meta, None, "nf4", 64, 8).shape == (4, 8)
    with pytest.raises(RuntimeError, match="768 bytes|bytes of codes"):
        call(x, offsets, *meta, None, "nf4", 64, 9)
    with pytest.raises(RuntimeError, match="int32"):
        call(x, offsets.long(), *meta, None, "nf4", 64, 8)


def test_a_whole_layer_compiles_in_one_graph():
    class Layer(torch.nn.Module):
        has_gate, has_bias = True, False

        def __init__(self):
            super().__init__()
            from kbit.formats.spec import Format
            from kbit.nn.experts import ExpertWeight

            self.gate_up_proj = ExpertWeight(4, 64, 64, format=Format.parse("nf4"))
            self.down_proj = ExpertWeight(4, 64, 32, format=Format.parse("nf4"))
            self.gate_up_proj.quantize_from(torch.randn(4, 64, 64))
            self.down_proj.quantize_from(torch.randn(4, 64, 32))

        def _apply_gate(self, x):
            gate, up = x.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

    layer = Layer()
    compiled = torch.compile(experts_forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5, 1):
        x = torch.randn(tokens, 64, requires_grad=True)
        index = torch.rand(tokens, 4).topk(2).indices
        scores = torch.rand(tokens, 2)
        out = compiled(layer, x, index, scores)
        assert torch.equal(out, experts_forward(layer, x, index, scores))
        w1, w2 = (p.dequantize(torch.float32).double() for p in (layer.gate_up_proj, layer.down_proj))
        for t in range(tokens):
            exact = sum(
                scores[t, j].double() * (w2[e] @ layer._apply_gate(w1[e] @ x[t].double()))
                for j, e in enumerate(index[t].tolist())
            )
            torch.testing.assert_close(out[t].double(), exact, rtol=1e-4, atol=1e-4)
