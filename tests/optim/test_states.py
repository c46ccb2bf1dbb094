"""8-bit states: codes, memory, convergence; and what the step does with awkward tensors."""

from __future__ import annotations

import pytest
import torch

import kbit.optim as optim
from kbit.formats.blocks import dequantize_dynamic, quantize_dynamic
from kbit.optim.state import requantize

BACKENDS = ("torch", "native")
EIGHT = [
    ("Adam8bit", {}),
    ("AdamW8bit", {}),
    ("AdEMAMix8bit", {"t_alpha": 10, "t_beta3": 10, "alpha": 1.0}),
    ("Lion8bit", {"weight_decay": 0.1}),
    ("SGD8bit", {"lr": 0.01, "momentum": 0.9}),
    ("RMSprop8bit", {"momentum": 0.9}),
    ("RMSprop8bit", {"momentum": 0.9, "centered": True}),
    ("Adagrad8bit", {}),
    ("LAMB8bit", {"weight_decay": 0.01}),
    ("LARS8bit", {"lr": 0.1, "momentum": 0.9}),
]


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("name", "settings"), [(n.removesuffix("8bit"), s) for n, s in EIGHT])
def test_compiled_step_equals_plain_torch_to_the_bit(name, settings, bits, dtype):
    results = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (4097, 1, 257, 0, 110_000)]
        optimizer = getattr(optim, name)(params, optim_bits=bits, min_8bit_size=1, **settings)
        optimizer.backend = backend
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p) * (torch.rand_like(p) > 0.2)
            optimizer.step()
        results.append([p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()])
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.native
@pytest.mark.parametrize("signed", [True, False])
def test_compiled_codes_are_the_nearest(signed):
    """Codes of every magnitude, values exactly between two codes included, equal the oracle's."""
    if signed:
        values = torch.cat([torch.randn(50_000), torch.randn(50_000) * 10.0 ** torch.randint(-9, 9, (50_000,))])
    else:
        values = torch.cat([torch.rand(50_000), torch.rand(50_000) * 10.0 ** torch.randint(-9, 9, (50_000,))])
    from kbit.formats.codebooks import codebook

    midpoints = codebook("dynamic8" if signed else "dynamic8-unsigned", "cpu", "midpoints")
    values = torch.cat([values, torch.cat([midpoints, midpoints * 3, torch.zeros(2)])])
    # A step whose new state is the gradient (SGD) or its square root's square (Adagrad) writes these codes.
    p = torch.nn.Parameter(torch.zeros_like(values))
    p.grad = values if signed else values.sqrt()
    kind = optim.SGD8bit([p], lr=0.0, momentum=0.9, min_8bit_size=1) if signed else optim.Adagrad8bit([p], lr=0.0)
    kind.backend = "native"
    kind.step()
    name = "momentum_buffer" if signed else "sum"
    wanted = p.grad if signed else p.grad * p.grad
    codes, absmax = quantize_dynamic(wanted, signed, 256)
    if not signed:  # a positive sum of squares has the smallest positive code at least
        codes = codes.maximum((wanted >= torch.finfo(torch.float32).tiny).byte())
    assert torch.equal(kind.state[p][name + "_absmax"], absmax)
    assert torch.equal(kind.state[p][name], codes)


def test_adamw8bit_memory():
    p = torch.nn.Parameter(torch.zeros(1000, 1000, dtype=torch.bfloat16))
    optimizer = optim.AdamW8bit([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(v.untyped_storage().nbytes() for v in optimizer.state[p].values())
    assert held / p.numel() <= 2.04


@pytest.mark.parametrize(("name", "settings"), EIGHT)
def test_same_minimum_on_a_convex_problem(name, settings):
    """Least squares with a unique minimum: the 8-bit optimizer ends where its 32-bit form does."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 64, generator=generator)
    truth = torch.randn(64, 96, generator=generator)
    losses = {}
    for bits in (8, 32):
        p = torch.nn.Parameter(torch.full((64, 96), 0.5))
        settings = {**settings, "lr": {"Lion8bit": 0.05, "SGD8bit": 0.5, "LARS8bit": 0.5, "RMSprop8bit": 3e-3,
                                       "Adagrad8bit": 0.5, "LAMB8bit": 0.05}.get(name, 0.05),
                    "weight_decay": 0.0}  # fmt: skip
        optimizer = getattr(optim, name.removesuffix("8bit"))([p], optim_bits=bits, **settings)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=200)
        for _ in range(200):
            loss = ((inputs @ p - inputs @ truth) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses[bits] = loss.item()
    start = ((inputs @ torch.full((64, 96), 0.5) - inputs @ truth) ** 2).mean().item()
    assert losses[8] < 2e-2 * start
    assert losses[8] < losses[32] + 1e-3 * start


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit", "Adagrad8bit"])
def test_a_bad_gradient_harms_nothing_else_in_8_bits(name, value, backend):
    """An element whose new state is not finite keeps value and state; the others move as if it were not there."""
    start = torch.randn(5000)
    bad = torch.zeros(5000, dtype=torch.bool)
    bad[[0, 300, 4999]] = True
    results = []
    for harm in (False, True):
        torch.manual_seed(3)
        p = torch.nn.Parameter(start.clone())
        optimizer = getattr(optim, name)([p], lr=0.01)
        optimizer.backend = backend
        for step in range(3):
            g = torch.randn(5000)
            g[bad] = 0.0
            if harm and step == 1:
                g[bad] = value
            p.grad = g
            optimizer.step()
        results.append((p.detach().clone(), optimizer.state[p]))
    (clean, _), (harmed, state) = results
    assert torch.isfinite(harmed).all()
    if not (name == "Lion8bit" and value == 1e30):  # Lion's state holds 1e30, so its block is scaled by it
        assert torch.equal(clean[~bad], harmed[~bad])
    for key, values in state.items():
        assert torch.isfinite(values.float()).all(), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_is_torchs_in_32_bits(value, backend):
    ours, theirs = (torch.nn.Parameter(torch.ones(600)) for _ in range(2))
    for p, optimizer in ((ours, optim.AdamW([ours])), (theirs, torch.optim.AdamW([theirs]))):
        if p is ours:
            optimizer.backend = backend
        for _ in range(2):
            p.grad = torch.ones(600)
            p.grad[7] = value
            optimizer.step()
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.isfinite().sum() == 599


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_parameters_and_gradients(backend):
    """States follow the logical order: a transposed parameter moves exactly like its contiguous twin."""
    base, g = torch.randn(90, 70), torch.randn(90, 70)
    views = {
        "transposed": (base.clone().t().contiguous().t(), g.t().contiguous().t()),
        "strided": (torch.randn(90, 140)[:, ::2].copy_(base), torch.randn(180, 70)[::2].copy_(g)),
        "expanded": (base.clone(), g[:, :1].expand(90, 70)),
    }
    for name, (p, grad) in views.items():
        assert not (p.is_contiguous() and grad.is_contiguous())
        results = []
        for parameter, gradient in ((p, grad), (p.contiguous().clone(), grad.contiguous())):
            parameter = torch.nn.Parameter(parameter)
            address = parameter.data_ptr()
            optimizer = optim.AdamW8bit([parameter], lr=0.1)
            optimizer.backend = backend
            for _ in range(2):
                parameter.grad = gradient
                optimizer.step()
            assert parameter.data_ptr() == address, name
            results.append(parameter.detach())
        assert torch.equal(*results), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_sizes_in_one_group(backend):
    params = [
        torch.nn.Parameter(torch.randn(shape).to(dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for shape in ((0,), (), (3, 0, 2), (100, 100), (17,))
    ]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    together = optim.AdamW8bit(params, lr=0.1)
    together.backend = backend
    for p, q in zip(params, alone, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    together.step()
    for p, q in zip(params, alone, strict=True):
        single = optim.AdamW8bit([q], lr=0.1)
        single.backend = backend
        single.step()
        assert torch.equal(p, q)
        assert (together.state[p]["exp_avg"].dtype == torch.uint8) == (p.numel() >= 4096)


def test_float64_parameters_keep_their_precision():
    p = torch.nn.Parameter(torch.randn(500, dtype=torch.float64))
    q = torch.nn.Parameter(p.detach().clone())
    for parameter, optimizer in ((p, optim.AdamW([p])), (q, torch.optim.AdamW([q]))):
        parameter.grad = torch.ones_like(parameter) / 3
        optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-8)
    assert (p != p.float().double()).any()


def test_bf16_parameters_round_once():
    """The new value is the fp32 result rounded to nearest even, from the unrounded parameter and decay."""
    p = torch.nn.Parameter(torch.randn(5000).bfloat16())
    wide = torch.nn.Parameter(p.detach().float())
    p.grad = torch.randn(5000).bfloat16()
    wide.grad = p.grad.float()
    for parameter in (p, wide):
        optim.AdamW([parameter], lr=0.02, weight_decay=0.3).step()
    assert torch.equal(p, wide.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_unbiased_and_repeatable(backend):
    """Updates of 1/40 of a bf16 step are lost by rounding to nearest, and kept on average by random bits."""
    results = []
    for stochastic in (True, True, False):
        p = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        optimizer = optim.SGD([p], lr=2**-7 / 40, stochastic_rounding=stochastic)
        optimizer.backend = backend
        for _ in range(80):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        results.append(p.detach().float())
    assert torch.equal(results[0], results[1])
    assert abs(results[0].mean().item() - (1 + 2 * 2**-7)) < 2e-4
    assert (results[2] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_compensation_keeps_small_updates(backend, dtype):
    p = torch.nn.Parameter(torch.ones(5000, dtype=dtype))
    wide = torch.nn.Parameter(torch.ones(5000))
    optimizers = [optim.AdamW8bit([p], lr=1e-4, kahan=True), optim.AdamW8bit([wide], lr=1e-4)]
    optimizers[0].backend = backend
    for _ in range(200):
        p.grad = torch.ones_like(p)
        wide.grad = torch.ones_like(wide)
        for optimizer in optimizers:
            optimizer.step()
    value = p.detach().float() + optimizers[0].state[p]["compensation"].float()
    moved = (1 - wide.detach()).abs()
    assert moved.min() > 0.015
    assert ((value - wide.detach()).abs() < 0.03 * moved).all()
    assert optimizers[0].state[p]["compensation"].dtype == dtype


def test_dequantized_state_is_close_to_the_32_bit_one():
    p8, p32 = (torch.nn.Parameter(torch.zeros(8192)) for _ in range(2))
    o8, o32 = optim.AdamW8bit([p8]), optim.AdamW32bit([p32])
    for _ in range(10):
        p8.grad = torch.randn(8192)
        p32.grad = p8.grad.clone()
        o8.step()
        o32.step()
    s = o8.state[p8]
    m = dequantize_dynamic(s["exp_avg"], s["exp_avg_absmax"], True, 256, torch.float32)
    assert (m - o32.state[p32]["exp_avg"]).norm() < 0.03 * o32.state[p32]["exp_avg"].norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_centered_rmsprop_has_32_bit_states_and_torchs_steps(backend):
    """The difference of two 8-bit states reached 0, and one step divided by eps alone."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(4096)) for _ in range(2))
    optimizer = optim.RMSprop8bit([ours], lr=1e-3, centered=True)
    optimizer.backend = backend
    other = torch.optim.RMSprop([theirs], lr=1e-3, centered=True)
    for _ in range(100):
        ours.grad = 1 + 0.2 * torch.randn(4096)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        other.step()
    assert set(optimizer.state[ours]) == {"step", "square_avg", "grad_avg"}
    assert all(value.dtype == torch.float32 for value in optimizer.state[ours].values())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 32])
def test_8_bit_states_of_a_centered_rmsprop_load_without_a_leap(bits):
    """Earlier versions saved codes, whose variance may be 0: the loaded run's steps stay of the usual size."""
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = optim.RMSprop([p], lr=1e-3, centered=True)
    for _ in range(100):
        p.grad = 1 + 0.1 * torch.randn(4096)
        optimizer.step()
    saved = optimizer.state_dict()
    for name, signed in (("square_avg", False), ("grad_avg", True)):
        codes, absmax = quantize_dynamic(saved["state"][0][name], signed, 256)
        saved["state"][0] |= {name: codes, f"{name}_absmax": absmax}
    loaded = optim.RMSprop([p], lr=1e-3, centered=True, optim_bits=bits)
    loaded.load_state_dict(saved)
    for _ in range(100):
        before = p.detach().clone()
        p.grad = 1 + 0.1 * torch.randn(4096)
        loaded.step()
        assert (p - before).abs().max() < 0.02  # 20 learning rates; the deviation asks for about 10
    assert loaded.state[p]["square_avg"].dtype == torch.float32


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [0, 1, 256, 1000, (256 << 13) + 300])
def test_decoded_codes_become_the_same_codes_again(count, signed):
    values = torch.randn(count) * torch.rand(count) ** 3
    codes, absmax = quantize_dynamic(values if signed else values.square(), signed, 256)
    decoded = dequantize_dynamic(codes, absmax, signed, 256, torch.float32)
    for ours, first in zip(requantize(decoded, signed), (codes, absmax), strict=True):
        assert torch.equal(ours, first)
    # Other values get the nearest codes as ever: no block of these is one of decoded codes.
    for ours, plain in zip(
        requantize(values.abs() - 2, True), quantize_dynamic(values.abs() - 2, True, 256), strict=True
    ):
        assert count == 1 or torch.equal(ours, plain)


def test_a_run_by_way_of_32_bits_continues_to_the_bit():
    p = torch.nn.Parameter(torch.randn(70, 100))
    optimizer = optim.AdamW8bit([p])
    for _ in range(3):
        p.grad = torch.randn(70, 100)
        optimizer.step()
    wide, again = optim.AdamW32bit([p]), optim.AdamW8bit([torch.nn.Parameter(p.detach().clone())])
    wide.load_state_dict(optimizer.state_dict())
    again.load_state_dict(wide.state_dict())
    (q,) = again.param_groups[0]["params"]
    p.grad = torch.randn(70, 100)
    q.grad = p.grad.clone()
    optimizer.step()
    again.step()
    assert torch.equal(p, q)
    for key, value in optimizer.state[p].items():
        assert torch.equal(value, again.state[q][key]), key
