"""Products over experts as a GPU runs them: every path against float64, graphs, gradients, no wait for the routing."""

from __future__ import annotations

import pytest
import torch

import kbit
from kbit import ops
from kbit.nn.experts import ExpertWeight, experts_forward

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 8e-3}


def weight(label, experts, n, k, block_size=64):
    fmt = kbit.formats.Format.parse(label, block_size if label != "int8" else None)
    layer = ExpertWeight(experts, n, k, format=fmt, device="cuda")
    layer.quantize_from(torch.randn(experts, n, k, device="cuda") * 0.05)
    return layer, layer.dequantize(torch.float32).double()


def route(rows, experts, uneven=2.0):
    """Sorted experts of rows, some of nobody, and where each one's rows end."""
    chosen = torch.multinomial(torch.rand(experts + 1, device="cuda") ** uneven + 1e-9, rows, True).sort().values
    ends = torch.searchsorted(chosen, torch.arange(experts, device="cuda"), right=True, out_int32=True)
    return chosen, ends


def expected(x, chosen, w, bias=None):
    out = torch.zeros(x.shape[0], w.shape[1], device="cuda", dtype=torch.float64)
    for e in range(w.shape[0]):
        mine = chosen == e
        out[mine] = x[mine].double() @ w[e].T + (0 if bias is None else bias[e].double())
    return out


def close(out, exact, dtype):
    assert out.dtype == dtype and out.shape == exact.shape and out.isfinite().all()
    assert (out.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize(
    "label, experts, n, k, block_size, dtype",
    [
        ("nf4", 8, 256, 512, 64, torch.bfloat16),
        ("fp4-plain", 40, 200, 1152, 128, torch.float16),
        ("nf4", 3, 129, 33, 32, torch.bfloat16),
        ("nf4", 2, 64, 128, 64, torch.float32),
        ("int8", 8, 256, 512, 0, torch.bfloat16),
        ("int8", 3, 129, 33, 0, torch.float32),
    ],
)
def test_every_path(label, experts, n, k, block_size, dtype):
    layer, w = weight(label, experts, n, k, block_size)
    bias = torch.randn(experts, n, device="cuda").to(dtype)
    for rows in (1, 9, 33 * experts, 100 * experts, 300 * experts):
        chosen, ends = route(rows, experts)
        x = torch.randn(rows, k, device="cuda").to(dtype).requires_grad_()
        out = layer(x, ends, bias)
        close(out.detach(), expected(x.detach(), chosen, w, bias), dtype)
        grad = torch.randn_like(out)
        (x_grad,) = torch.autograd.grad(out, x, grad)
        close(x_grad, expected(grad, chosen, w.transpose(1, 2)), dtype)


def test_one_expert_takes_all_or_nobody_does():
    layer, w = weight("nf4", 8, 256, 512)
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    for expert in (0, 5, 7, 8):
        chosen = torch.full((300,), expert, device="cuda")
        ends = torch.searchsorted(chosen, torch.arange(8, device="cuda"), right=True, out_int32=True)
        close(layer(x, ends), expected(x, chosen, w), torch.bfloat16)
    empty = torch.zeros(8, dtype=torch.int32, device="cuda")
    assert layer(x[:0], empty).shape == (0, 256)


def mixtral():
    tf = pytest.importorskip("transformers")
    moe = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    if not hasattr(moe, "MixtralExperts"):
        pytest.skip("transformers 4 keeps experts as separate linear layers")
    config = tf.MixtralConfig(hidden_size=512, intermediate_size=1024, num_local_experts=8)
    config._experts_implementation = "eager"
    holder = torch.nn.Module()
    holder.experts = moe.MixtralExperts(config).to("cuda", torch.bfloat16)
    for p in holder.experts.parameters():
        p.data.normal_(std=0.02)
    return holder.experts, kbit.quantize_model(holder, kbit.KbitConfig(bits=4)).experts


@pytest.mark.parametrize("tokens", [1, 16, 600])
def test_a_layer_captures_in_a_cuda_graph_and_follows_its_routing(tokens):
    _, layer = mixtral()
    eager = kbit.dequantize_model(torch.nn.ModuleDict({"experts": mixtral()[1]}), torch.bfloat16).experts
    eager.load_state_dict(
        {name: getattr(layer, name).dequantize(torch.bfloat16) for name in ("gate_up_proj", "down_proj")}
    )
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(tokens, 8, device="cuda").topk(2).indices
    scores = torch.rand(tokens, 2, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            experts_forward(layer, x, index, scores)
            experts_forward(layer, x, index, scores)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = experts_forward(layer, x, index, scores)
        for _ in range(3):
            x.normal_()
            index.copy_(torch.rand(tokens, 8, device="cuda").topk(2).indices)
            graph.replay()
            exact = eager(x, index, scores).double()
            assert (out.double() - exact).norm() <= 2e-2 * exact.norm()


def test_compiles_without_a_break():
    _, layer = mixtral()
    compiled = torch.compile(experts_forward, fullgraph=True)
    x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index = torch.rand(5, 8, device="cuda").topk(2).indices
    scores = torch.rand(5, 2, device="cuda")
    out, plain = compiled(layer, x, index, scores), experts_forward(layer, x, index, scores)
    assert (out - plain).norm() <= 1e-2 * plain.norm()
    ours, theirs = (torch.autograd.grad(o.float().square().sum(), x)[0] for o in (out, plain))
    assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_results_repeat_bit_for_bit():
    layer, _ = weight("nf4", 8, 4096, 2048)
    x = torch.randn(32, 2048, device="cuda", dtype=torch.bfloat16)
    _, ends = route(32, 8)
    first = ops.experts_4bit(x, ends, layer.weight, layer.absmax, layer.nested_absmax, layer.nested_offset, None, "nf4", 64, 4096)  # fmt: skip  # noqa: E501
    assert all(torch.equal(first, layer(x, ends)) for _ in range(10))
