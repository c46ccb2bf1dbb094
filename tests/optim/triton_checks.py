"""What test_triton.py runs in its own process: the step on a GPU (Triton's, or the CUDA kernel) against the plain one.

States and steps are equal to the bit, but for codes where two are equally near to within 1e-6 of the value, and so are
parameters but for the last bits of an update (fast quotients and roots).
"""

from __future__ import annotations

import os

import pytest
import torch

import kbit.optim as optim
from kbit.formats.blocks import dequantize_dynamic, quantize_dynamic
from kbit.formats.codebooks import codebook

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# On a GPU also "auto": the CUDA kernel wherever it serves.
BACKEND = os.environ.get("KBIT_CHECKED_STEP", "triton")

if DEVICE == "cpu":
    from tests.triton_interpreter import mend

    mend()

CASES = [
    ("Adam", {"weight_decay": 0.1}),
    ("AdamW", {}),
    ("AdamW", {"max_unorm": 0.01}),
    ("AdEMAMix", {"t_alpha": 5, "t_beta3": 5}),
    ("Lion", {"weight_decay": 0.1}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("LARS", {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("RMSprop", {"centered": True}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("LAMB", {"weight_decay": 0.1}),
    ("AdamW", {"skip_zeros": True}),
    ("AdamW", {"kahan": True}),
    ("AdamW", {"stochastic_rounding": True}),
]
SHAPES = ((2600,), (), (0,), (1024,), (33, 129))


def run(backend, name, settings, bits, dtype, steps=2, lr=None, bad=False):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in SHAPES]
    if lr is not None:
        settings = {**settings, "lr": lr}
    optimizer = getattr(optim, name)(params, optim_bits=bits, min_8bit_size=1, **settings)
    optimizer.backend = backend
    for step in range(steps):
        for p in params:
            g = torch.randn(p.shape, generator=generator) * (torch.rand(p.shape, generator=generator) > 0.2)
            if bad and step == 1 and g.numel() > 1000:
                g.view(-1)[[0, 700]] = torch.tensor([float("nan"), float("inf")])
            p.grad = g.to(DEVICE, dtype)
        optimizer.step()
    tensors = {}
    for index, p in enumerate(params):
        tensors[f"p{index}"] = p.detach()
        tensors |= {f"{k}{index}": v for k, v in optimizer.state[p].items()}
    return tensors


def check(a, b, exact=False):
    assert a.keys() == b.keys()
    for key in a:
        ours, plain = (torch.nan_to_num(t[key].float(), 7.0) for t in (a, b))
        if exact:
            assert torch.equal(ours, plain), key
        elif a[key].dtype == torch.uint8:
            # bf16 gradients have few distinct ratios: exact ties happen.
            assert (ours != plain).sum() <= 2 + ours.numel() // 200, key
        elif key.startswith(("p", "compensation")):
            # A difference in the last bit of an update may tip a rounding; another code is a part of an update away.
            close = torch.isclose(ours, plain, rtol=2e-6, atol=2e-7)
            assert (~close).sum() <= 2 + ours.numel() // 200, key
            torch.testing.assert_close(ours, plain, rtol=2**-6, atol=2**-6)
        else:
            # A state near zero may be a sum of parts of opposite sign, each right to its own last bit.
            largest = float(plain.abs().max()) if plain.numel() else 1.0
            torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-7 * max(1.0, largest))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_equals_plain_torch(name, settings, bits):
    dtype = torch.bfloat16 if settings.keys() & {"kahan", "stochastic_rounding"} else torch.float32
    check(run(BACKEND, name, settings, bits, dtype), run("torch", name, settings, bits, dtype))


@pytest.mark.parametrize("name", ["AdamW", "AdEMAMix", "RMSprop", "Adagrad"])
def test_second_moments_beside_much_larger_ones(name):
    """Squares too small for a code, in blocks of usual, very large and very small values: 0 has its code, alone."""
    results = []
    for backend in (BACKEND, "torch"):
        generator = torch.Generator().manual_seed(0)
        sizes = (1.0, 1e12, 1e-18, 1e-25)
        params = [torch.nn.Parameter(torch.randn(1100, generator=generator).to(DEVICE)) for _ in sizes]
        optimizer = getattr(optim, name)(params, lr=0.01, optim_bits=8, min_8bit_size=1)
        optimizer.backend = backend
        for _ in range(2):
            for p, size in zip(params, sizes, strict=True):
                g = torch.randn(1100, generator=generator) * size
                g[::256] *= 1e5
                g[1::256] *= 1e-12
                g[512:768] *= 1e-12
                g[512] *= 1e15
                g[2::5] = 0.0
                p.grad = g.to(DEVICE)
            optimizer.step()
        results.append({f"p{i}": p.detach() for i, p in enumerate(params)})
        results[-1] |= {f"{k}{i}": v for i, p in enumerate(params) for k, v in optimizer.state[p].items()}
    check(*results)
    for index, size in enumerate(sizes):
        key = next(key for key in ("exp_avg_sq", "square_avg", "sum") if key + "0" in results[0]) + str(index)
        ours, plain = (r[key].cpu() for r in results)
        assert torch.equal(ours == 0, plain == 0) and (plain == 0)[2::5].all(), key
        assert size < 1 or (plain == 1).sum() > 500, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 32])
def test_low_precision_parameters(bits, dtype):
    check(run(BACKEND, "AdamW", {"lr": 0.01}, bits, dtype), run("torch", "AdamW", {"lr": 0.01}, bits, dtype))


@pytest.mark.parametrize("bits", [8, 32])
def test_gradients_that_are_not_finite(bits):
    results = [run(backend, "AdamW", {}, bits, torch.float32, bad=True) for backend in (BACKEND, "torch")]
    check(*results)
    assert torch.isfinite(results[0]["p0"]).all() == (bits == 8)


def test_learning_rate_as_a_tensor_on_the_device():
    lr = torch.tensor(0.02, device=DEVICE)
    check(run(BACKEND, "AdamW", {}, 8, torch.float32, lr=lr), run("torch", "AdamW", {"lr": 0.02}, 8, torch.float32))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_equal_the_oracle(signed):
    generator = torch.Generator().manual_seed(5)
    midpoints = codebook("dynamic8" if signed else "dynamic8-unsigned", "cpu", "midpoints")
    wide = torch.randn(6000, generator=generator) * 10.0 ** torch.randint(-9, 9, (6000,), generator=generator)
    parts = [torch.randn(6000, generator=generator), wide, midpoints, midpoints * 3, codebook("dynamic8"),
             torch.zeros(300), torch.tensor([1.0]), torch.logspace(-8, 0, 5000)]  # fmt: skip
    values = torch.cat(parts).to(DEVICE)
    values = values if signed else values.abs().sqrt()
    p = torch.nn.Parameter(torch.zeros_like(values))
    p.grad = values
    kind = optim.SGD8bit([p], lr=0.0, momentum=0.9, min_8bit_size=1) if signed else optim.Adagrad8bit([p], lr=0.0)
    kind.backend = BACKEND
    kind.step()
    name = "momentum_buffer" if signed else "sum"
    wanted = values if signed else values * values
    codes, absmax = quantize_dynamic(wanted, signed, 256)
    if not signed:  # a positive sum of squares has the smallest positive code at least
        codes = codes.maximum((wanted >= torch.finfo(torch.float32).tiny).byte())
    assert torch.equal(kind.state[p][name + "_absmax"], absmax)
    ours = kind.state[p][name]
    distances = [(dequantize_dynamic(c, absmax, signed, 256, torch.float32) - wanted).abs() for c in (ours, codes)]
    assert (distances[0] <= distances[1] + 1e-6 * wanted.abs()).all()
    assert (ours != codes).sum() < 600  # the values put exactly between two codes


def test_unaligned_views_and_mixed_groups():
    """Views that start anywhere, and two dtypes: fp32 of 8 and 32 bits, and bf16."""
    results = []
    for backend in (BACKEND, "torch"):
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(9000, generator=generator).to(DEVICE)
        params = [torch.nn.Parameter(whole[3:4700]), torch.nn.Parameter(whole[4701:4711])]
        params.append(torch.nn.Parameter(torch.randn(5000, generator=generator).to(DEVICE, torch.bfloat16)))
        optimizer = optim.AdamW8bit(params, lr=0.01)
        optimizer.backend = backend
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            optimizer.step()
        results.append({f"p{i}": p.detach() for i, p in enumerate(params)})
    check(*results)


@pytest.mark.parametrize("extra", [{}, {"max_unorm": 0.02}])
@pytest.mark.parametrize("bits", [8, 32])
def test_paged_chunks_equal_the_unpaged_step_to_the_bit(bits, extra, monkeypatch):
    """Chunks of 512 to 2048 elements that cut tensors, two staging buffers, random bits by element: same results."""
    from kbit.optim import paging, state

    monkeypatch.setattr(paging, "STAGING_BYTES", 4096)
    monkeypatch.setattr(state, "MIN_PAGED_SIZE", 1)
    results = []
    for paged in (False, True):
        generator = torch.Generator().manual_seed(1)
        sizes = (300, 5000, 0, 1111)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(DEVICE, torch.bfloat16)) for n in sizes]
        options = {"optim_bits": bits, "min_8bit_size": 1, "stochastic_rounding": True, **extra}
        optimizer = optim.AdamW(params, lr=0.01, is_paged=paged, **options)
        optimizer.backend = BACKEND
        if paged and DEVICE == "cpu":  # no pinned memory here: take the paged path with ordinary memory
            from kbit.optim import gpu

            def step(batch, plans, key, cuda):
                paging.step_paged(batch, plans, key, cuda)

            original = gpu.step_gpu
            if not extra:
                monkeypatch.setattr(gpu, "step_gpu", step)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            optimizer.step()
        if paged and DEVICE == "cpu":
            monkeypatch.setattr(gpu, "step_gpu", original)
        optimizer.state_dict()
        results.append({f"{k}{i}": v.cpu() for i, p in enumerate(params) for k, v in optimizer.state[p].items()})
        results[-1] |= {f"p{i}": p.detach().cpu() for i, p in enumerate(params)}
    check(*results, exact=True)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("AdamW", [{"optim_bits": 32}, {"optim_bits": 8}, {"max_unorm": 0.01}, {"max_unorm": 0.0}, {"kahan": True}]),
        ("SGD", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]),
        ("AdamW", [torch.float16, torch.bfloat16]),
        ("AdamW", ["states", "states"]),
    ],
)
def test_what_a_plan_has_written_down_may_change_between_steps(name, changes):
    """Settings of a group, the parameters' dtype, states that left the device: no address of old states is used."""
    results = []
    for backend in (BACKEND, "torch"):
        generator = torch.Generator().manual_seed(2)
        net = torch.nn.ParameterList(torch.randn(n, generator=generator).to(DEVICE).bfloat16() for n in (5000, 300))
        optimizer = getattr(optim, name)(list(net), lr=0.01, optim_bits=8, kahan=torch.float16 in changes)
        optimizer.backend = backend
        for change in ({}, *changes):
            if isinstance(change, dict):
                optimizer.param_groups[0].update(change)
            elif change == "states":
                for state in optimizer.state.values():
                    state.update({key: value.cpu().clone() for key, value in state.items()})
                    state.update({key: value.to(DEVICE) for key, value in state.items()})
            else:
                net.to(change)
            for p in net:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            optimizer.step()
        found = {f"{key}{i}": v for i, p in enumerate(net) for key, v in optimizer.state[p].items()}
        results.append(found | {f"p{i}": p.detach() for i, p in enumerate(net)})
    check(*results)


@pytest.mark.parametrize("change", ["parameter", "gradient", "state", "absmax"])
def test_no_plan_outlives_what_it_has_written_down(change):
    """Memory that a plan's table names and that was freed, between two steps that would both use the plan."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(DEVICE)) for n in (5000, 6000)]
    optimizer = optim.AdamW8bit(params)
    optimizer.backend = BACKEND
    for step in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
        if step < 2:
            optimizer.step()
    state = optimizer.state[params[1]]
    if change == "parameter":
        params[1].grad = None
        params[1].data = torch.randn(9000, generator=generator).to(DEVICE)
        params[1].grad = torch.ones_like(params[1])
    elif change == "gradient":
        params[1].grad.data = torch.ones(10, device=DEVICE)
    elif change == "state":
        state["exp_avg_sq"] = state["exp_avg_sq"][:10].clone()
    else:
        state["exp_avg_sq_absmax"].data = torch.ones(1, device=DEVICE)
    kept = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="parameter 1 of group 0"):
        optimizer.step()
    assert torch.equal(params[0], kept)
    params[1].grad = torch.ones_like(params[1])
    del optimizer.state[params[1]]
    optimizer.step()
    assert optimizer.state[params[1]]["exp_avg_sq"].shape == params[1].shape


def test_a_plan_outlives_copies_of_parameters_that_are_not_contiguous():
    p = torch.nn.Parameter(torch.randn(80, 70).T.to(DEVICE))
    optimizer = optim.AdamW8bit([p])
    optimizer.backend = BACKEND
    plans = []
    for _ in range(3):
        p.grad = torch.randn(70, 80).to(DEVICE)
        optimizer.step()
        plans += optimizer._plans.values()
    assert plans[0] is plans[1] is plans[2]
