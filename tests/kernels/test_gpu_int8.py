"""The int8 operators as a GPU runs them: every path against float64 and the CPU, graphs, compilation, streams."""

from __future__ import annotations

import pytest
import torch

from kbit import ops
from kbit.formats import blocks
from kbit.ops import choose, cuda

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.2e-3, torch.bfloat16: 8e-3}


def quantized(n, k, device="cuda"):
    """((codes, bits of the scales), exact weight in float64)"""
    codes, absmax = blocks.quantize_int8(torch.randn(n, k, device=device) * 0.05)
    return (codes, absmax.view(torch.int32)), codes.double() * absmax.double()[:, None] / 127


def activations(m, k, outliers, dtype, device="cuda"):
    x = torch.randn(m, k, device=device).clamp(-4, 4)
    x[:, torch.randperm(k, device=device)[:outliers]] *= 20
    return x.to(dtype)


def close(out, expected, dtype):
    assert out.dtype == dtype and out.shape == expected.shape and out.isfinite().all()
    error = ((out.double() - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE[dtype], error


def llm_int8(x, weight, bias, threshold=6.0):
    """The algorithm in float64, from x as it is in its dtype. Codes are those of the format's plain torch."""
    codes, absmax = weight[0].double(), weight[1].view(torch.float32).double() / 127
    outlier = x.float().abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
    columns = outlier.any(dim=0)
    out = x[:, columns].double() @ codes[:, columns].T
    if columns.sum() > choose.llm_int8_outliers("cuda", *x.shape):
        out = x.double() @ codes.T
    else:
        inner = x.float().masked_fill(outlier, 0.0)
        rows = inner.abs().amax(dim=1)
        ours = blocks.int8_codes(inner, rows).double().masked_fill_(columns, 0.0)
        out += ours @ codes.T * (rows.double()[:, None] / 127)
    return out * absmax + (0.0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n, k", [(250, 1040), (517, 2816), (70, 100), (40, 33)])
def test_products_at_every_token_count(n, k, dtype):
    weight, exact = quantized(n, k)
    bias = torch.randn(n, device="cuda").to(dtype)
    for m in (1, 7, 16, 33, 64, 65, 129, 300):
        x = activations(m, k, 3, dtype)
        few, many = (ops.linear_8bit(x, *weight, bias, 6.0, asked) for asked in (False, True))
        close(few, x.double() @ exact.T + bias.double(), dtype)
        close(many, llm_int8(x, weight, bias), dtype)
        out = ops.linear_8bit(x, *weight, bias, 6.0)
        assert torch.equal(out, few if m <= choose.GPU_WEIGHT_ONLY_TOKENS else many)
        grad = torch.randn(m, n, device="cuda").to(dtype)
        close(torch.ops.kbit.linear_8bit_grad_input(grad, *weight), grad.double() @ exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outliers", [0, 1, 16, 17, 200, 600, 1024])
def test_any_number_of_outlier_columns(outliers, dtype):
    weight, _ = quantized(300, 1024)
    for m, threshold in ((150, 6.0), (150, 0.0), (150, 3.3), (600, 6.0)):  # many tokens gather many columns beforehand
        x = activations(m, 1024, outliers, dtype)
        close(ops.linear_8bit(x, *weight, None, threshold), llm_int8(x, weight, None, threshold), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("m, n, k", [(65, 300, 1040), (130, 4096, 8208), (700, 517, 2816), (2100, 600, 1024)])
def test_too_many_outlier_columns_leave_int8(m, n, k, dtype):
    weight, exact = quantized(n, k)
    bias = torch.randn(n, device="cuda").to(dtype)
    x = (torch.randn(m, k, device="cuda") * 3).to(dtype)
    x[m // 2] = 7.0
    spread = activations(m, k, 0, dtype)  # one outlier a row, each in a column of its own
    spread[torch.arange(m), torch.arange(m) * 7 % k] = 9.0
    for rows in (x, torch.randn(m, 2 * k, device="cuda").to(dtype)[:, :k].copy_(x), spread):
        for asked in (None, False):
            out = ops.linear_8bit(rows, *weight, bias, 6.0, asked)
            close(out, rows.double() @ exact.T + bias.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_inputs_at_many_tokens_however_their_tiles_are_cut(dtype):
    if cuda.why_not():
        pytest.skip(cuda.why_not())
    from kbit.kernels.cuda import linear_8bit_wide as wide
    from kbit.kernels.cuda.stream_k import Schedule

    for n, k, m in ((256, 64, 100), (1001, 1088, 515), (776, 2320, 700), (264, 4096, 129), (520, 528, 1500)):
        weight, exact = quantized(n, k)
        x = torch.randn(m, k, device="cuda").to(dtype)
        bias = torch.randn(n, device="cuda").to(dtype)
        tiles = -(-n // 256) * -(-m // wide.choose_config(m).nt)
        for cut in (None, Schedule(1, 0), Schedule(3, 0), Schedule(5, tiles), Schedule(66, tiles)):
            torch.full((m, n), float("nan"), device="cuda", dtype=dtype)  # the output's memory, just freed
            out = wide.linear_8bit(x, *weight, bias, cut)
            close(out, x.double() @ exact.T + bias.double(), dtype)
            assert torch.equal(out, wide.linear_8bit(x, *weight, bias, cut))


def test_every_hopper_setting():
    if cuda.why_not():
        pytest.skip(cuda.why_not())
    from kbit.kernels.cuda import linear_8bit as few
    from kbit.kernels.cuda import llm_int8 as many

    dtype = torch.bfloat16
    for n, k in ((64, 64), (515, 4096), (200, 1072)):
        weight, exact = quantized(n, k)
        bias = torch.randn(n, device="cuda", dtype=dtype)
        for m in (1, 130, 300):
            x = activations(m, k, 5, dtype)
            expected = llm_int8(x, weight, bias)
            for config in (
                many.Config(256, 4, 2),
                many.Config(224),
                many.Config(192, 4, 1, 4),
                many.Config(128, 3, 1, 2),
            ):
                assert config.valid()
                close(many.llm_int8(x, *weight, bias, 6.0, config), expected, dtype)
                exactly = x.double() @ exact.T + bias.double()
                close(many.llm_int8(x, *weight, bias, 6.0, config, limit=4), exactly, dtype)
        for config in (few.Config(8, 1, 2, 8, 1, 2), few.Config(16, 2, 2, 6, 2), few.Config(32, 1, 3, 6, 4)):
            assert config.valid()
            for m in (1, config.nt, config.nt + 3):
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                close(few.linear_8bit(x, *weight, bias, config), x.double() @ exact.T + bias.double(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_experts(dtype):
    weight = [quantized(96, 128) for _ in range(6)]
    codes, scales = (torch.stack([w[0][i] for w in weight]) for i in (0, 1))
    for counts in ([0, 3, 40, 1, 0, 16], [100] * 6, [0] * 6):
        offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
        s = sum(counts) + 2  # two rows of no expert
        x, grad = (torch.randn(s, width, device="cuda").to(dtype) for width in (128, 96))
        bias = torch.randn(6, 96, device="cuda").to(dtype)
        exact = torch.cat([w[1][None].expand(c, -1, -1) for w, c in zip(weight, counts, strict=True)])
        out = ops.experts_8bit(x, offsets, codes, scales, bias)
        back = torch.ops.kbit.experts_8bit_grad_input(grad, offsets, codes, scales)
        assert (out[-2:] == 0).all() and (back[-2:] == 0).all()
        if len(exact):
            owner = torch.repeat_interleave(torch.tensor(counts, device="cuda"))
            close(out[:-2], (exact @ x[:-2].double()[..., None])[..., 0] + bias.double()[owner], dtype)
            close(back[:-2], (grad[:-2].double()[:, None] @ exact)[:, 0], dtype)


def test_bytes_are_those_of_the_cpu():
    for shape, dtype in (((300, 4096), torch.float16), ((64, 14336), torch.bfloat16), ((33, 100), torch.float32)):
        x = torch.randn(shape).to(dtype)
        codes, absmax = blocks.quantize_int8(x)
        ours = torch.ops.kbit.quantize_int8(x.cuda())
        assert torch.equal(ours[0].cpu(), codes) and torch.equal(ours[1].cpu(), absmax)
        back = torch.ops.kbit.dequantize_int8(*ours, dtype)
        assert torch.equal(back.cpu(), blocks.dequantize_int8(codes, absmax, dtype))
        ids = torch.tensor([3, 0, 3], device="cuda")
        assert torch.equal(ops.embedding_8bit(ids, *ours, dtype), back[ids])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_codes_of_activations_are_the_references(dtype):
    if cuda.why_not():
        pytest.skip(cuda.why_not())
    from kbit.kernels.cuda.llm_int8 import quantize_rows

    for m, k in ((5, 64), (100, 4096), (7, 14336), (600, 8192), (3, 32768)):
        x = activations(m, k, 4, dtype)
        x[0], x[1] = 0.0, x[1] * (1e-38 if dtype == torch.bfloat16 else 1e-7)
        for threshold in (6.0, 0.0, 2.51):
            codes = torch.empty(m, k, dtype=torch.int8, device="cuda")
            rows = torch.empty(m, device="cuda")
            flags = torch.full((k,), 7, dtype=torch.uint8, device="cuda") if threshold else None
            where = None if flags is None else flags.data_ptr()
            stream = torch.cuda.current_stream().cuda_stream
            quantize_rows(x, codes.data_ptr(), rows.data_ptr(), where, threshold, stream)
            values = x.float().cpu()
            outlier = values.abs() >= threshold if threshold else torch.zeros_like(values, dtype=torch.bool)
            inner = values.masked_fill(outlier, 0.0)
            assert torch.equal(rows.cpu(), inner.abs().amax(dim=1))
            assert torch.equal(codes.cpu(), blocks.int8_codes(inner, inner.abs().amax(dim=1)))
            assert flags is None or torch.equal(flags.cpu().bool(), outlier.any(dim=0))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_token(bad, threshold):
    weight, _ = quantized(256, 512)
    for dtype in TOLERANCE:
        for m in (20, 200):
            x = activations(m, 512, 6, dtype)
            x[11, 300] = bad
            out = ops.linear_8bit(x, *weight, None, threshold)
            others = [i for i in range(m) if i != 11]
            assert out[others].isfinite().all() and not out[11].isfinite().any()


@pytest.mark.parametrize("m", [1, 16, 100, 1000])
def test_captures_in_a_cuda_graph_and_repeats_bit_for_bit(m):
    weight, _ = quantized(512, 1024)
    x = activations(m, 1024, 0, torch.bfloat16)
    ops.linear_8bit(x, *weight, None, 6.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear_8bit(x, *weight, None, 6.0)
    for outliers in (6, 0, 40, 700, 3):  # the same graph, whatever the data holds
        x.copy_(activations(m, 1024, outliers, torch.bfloat16))
        out.fill_(float("nan"))
        graph.replay()
        first = out.clone()
        assert torch.equal(first, ops.linear_8bit(x, *weight, None, 6.0))
        graph.replay()
        assert torch.equal(first, out) and out.isfinite().all()


def test_no_synchronisation():
    weight, _ = quantized(256, 512)
    inputs = [activations(m, 512, 6, torch.bfloat16) for m in (4, 200)]
    for x in inputs:
        ops.linear_8bit(x, *weight, None, 6.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in inputs:
            ops.linear_8bit(x, *weight, None, 6.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("m", [3, 200])
def test_compiles_without_a_break_and_differentiates(m):
    weight, exact = quantized(256, 512)
    x = activations(m, 512, 3, torch.bfloat16).requires_grad_()
    compiled = torch.compile(lambda x: ops.linear_8bit(x, *weight, None, 6.0) * 2, fullgraph=True)
    out = compiled(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert torch.equal(out, ops.linear_8bit(x, *weight, None, 6.0) * 2)
    close(x.grad, 2 * grad.double() @ exact, torch.bfloat16)


def test_launches_on_the_current_stream():
    weight, exact = quantized(1024, 1024)
    source = activations(100, 1024, 4, torch.bfloat16)
    for m in (8, 100):
        x = torch.zeros(m, 1024, device="cuda", dtype=torch.bfloat16)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            x.copy_(source[:m])
            out = ops.linear_8bit(x, *weight, None, 6.0)
        side.synchronize()
        assert torch.equal(out, ops.linear_8bit(source[:m], *weight, None, 6.0)) and out.abs().sum() > 0


def test_a_second_gpu_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight, _ = quantized(512, 1024, "cuda:1")
    for m in (1, 64, 300):
        x = activations(m, 1024, 4, torch.bfloat16, "cuda:1")
        expected = ops.linear_8bit(x.to("cuda:0"), *(t.to("cuda:0") for t in weight), None, 6.0)
        assert torch.equal(ops.linear_8bit(x, *weight, None, 6.0).cpu(), expected.cpu())


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    rows, k = 140_000, 16_384  # 2.3 G elements
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    codes, absmax = torch.ops.kbit.quantize_int8(x)
    tail = slice(rows - 40, rows)
    expected = blocks.quantize_int8(x[tail])
    assert torch.equal(codes[tail], expected[0]) and torch.equal(absmax[tail], expected[1])
    out = torch.ops.kbit.dequantize_int8(codes, absmax, torch.bfloat16)[tail]
    assert torch.equal(out, blocks.dequantize_int8(*expected, torch.bfloat16))
    exact = codes[tail].double() * absmax[tail].double()[:, None] / 127
    for m, asked in ((4, False), (130, True)):  # as the weight
        token = activations(m, k, 3, torch.bfloat16)
        out = ops.linear_8bit(token, codes, absmax, None, 6.0, asked)[:, tail]
        close(
            out, llm_int8(token, (codes[tail], absmax[tail]), None) if asked else token.double() @ exact.T, token.dtype
        )
    small, _ = quantized(64, k)  # as the input
    out = ops.linear_8bit(x, *small, None, 6.0, True)[tail]
    flagged = (x.abs() >= 6).any(dim=0)
    assert flagged.any()
    exact = (small[0].double() * small[1].view(torch.float32).double()[:, None] / 127).T
    error = (out.double() - x[tail].double() @ exact).norm() / (x[tail].double() @ exact).norm()
    assert error < 2e-2


def test_no_less_accurate_than_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(1024, 2048, device="cuda", dtype=torch.float16) * 0.05
    layer = bnb.nn.Linear8bitLt(2048, 1024, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    layer = layer.cuda()
    parts = torch.ops.kbit.quantize_int8(weight)
    for dtype in (torch.float16, torch.bfloat16):
        for m in (1, 16, 64, 300):
            for outliers in (0, 6):
                x = activations(m, 2048, outliers, dtype)
                exact = x.double() @ weight.double().T
                ours = (ops.linear_8bit(x, *parts, None, 6.0).double() - exact).norm()
                assert ours <= 1.001 * (layer(x).double() - exact).norm(), (dtype, m, outliers)
