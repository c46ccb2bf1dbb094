"""Every 32-bit optimizer against torch.optim, or against the paper in float64 where torch has none: 100 steps."""

from __future__ import annotations

import pytest
import torch

import kbit.optim as optim

from .references import AdEMAMixReference, LAMBReference, LARSReference, LionReference

SHAPES = ((37, 53), (19,), (4, 3, 5), ())
BACKENDS = ("torch", "native")

AGAINST_TORCH = [
    ("Adam", {}, {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}, {}),
    ("AdamW", {}, {}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.3}, {}),
    ("SGD", {"lr": 0.1}, {}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, {}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}, {}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, {}),
    ("RMSprop", {}, {}),
    ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1, "lr": 1e-3}, {}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "lr": 1e-3}, {}),
    ("Adagrad", {}, {}),
    ("Adagrad", {"lr_decay": 0.01, "initial_accumulator_value": 0.3, "weight_decay": 0.1}, {}),
]


def gradients(step: int, params: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) * (1 + step % 3) for p in params]


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int = 100) -> None:
    for step in range(steps):
        for p, g in zip(params, gradients(step, params), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def make() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(99)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["", "32bit"])
@pytest.mark.parametrize(("name", "settings", "extra"), AGAINST_TORCH)
def test_equals_torch(name, settings, extra, form, backend):
    ours, theirs = make(), make()
    optimizer = getattr(optim, name + form)(ours, **settings)
    optimizer.backend = backend
    run(optimizer, ours)
    run(getattr(torch.optim, name)(theirs, **settings), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


PAPERS = [
    ("Lion", LionReference, {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    ("LAMB", LAMBReference, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}),
    ("AdEMAMix", AdEMAMixReference, {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8,
                                     "weight_decay": 0.01}),
    ("AdEMAMix", AdEMAMixReference, {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8,
                                     "weight_decay": 0.01, "t_alpha": 50, "t_beta3": 80}),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "reference", "settings"), PAPERS)
def test_equals_the_paper(name, reference, settings, backend):
    ours = make()
    references = [reference(p.detach()) for p in ours]
    optimizer = getattr(optim, name)(ours, **settings)
    optimizer.backend = backend
    for step in range(100):
        for p, ref, g in zip(ours, references, gradients(step, ours), strict=True):
            p.grad = g
            ref.step(g, **settings)
        optimizer.step()
    for p, ref in zip(ours, references, strict=True):
        torch.testing.assert_close(p.detach().double(), ref.p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lars_equals_the_paper(backend):
    ours = make()
    references = [LARSReference(p.detach()) for p in ours]
    optimizer = optim.LARS(ours, lr=0.5, momentum=0.9, weight_decay=0.01, max_unorm=0.02)
    optimizer.backend = backend
    for step in range(100):
        for p, ref, g in zip(ours, references, gradients(step, ours), strict=True):
            p.grad = g
            ref.step(g, lr=0.5, momentum=0.9, weight_decay=0.01, trust=0.02)
        optimizer.step()
    for p, ref in zip(ours, references, strict=True):
        torch.testing.assert_close(p.detach().double(), ref.p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_unorm_caps_the_update(backend):
    p = torch.nn.Parameter(torch.full((64, 8), 0.5))
    optimizer = optim.AdamW([p], lr=1.0, weight_decay=0.0, max_unorm=0.01)
    optimizer.backend = backend
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    optimizer.step()
    moved = (p.detach() - before).norm()
    torch.testing.assert_close(moved, 0.01 * before.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "SGD", "Adagrad"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_skip_zeros_leaves_elements_alone(name, backend):
    p = torch.nn.Parameter(torch.randn(100, 100))
    before = p.detach().clone()
    extra = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(optim, name)([p], lr=0.1, weight_decay=0.5, skip_zeros=True, **extra)
    optimizer.backend = backend
    hit = torch.rand_like(p) > 0.5
    for _ in range(3):
        p.grad = torch.randn_like(p) * hit
        optimizer.step()
    assert torch.equal(p[~hit], before[~hit])
    assert (p[hit] != before[hit]).all()


def test_lamb_without_decay_in_direction_and_bias_correction():
    """adam_w_mode=False adds decay to the gradient; bias_correction=False leaves the averages as they are."""
    p = torch.nn.Parameter(torch.randn(40))
    start, g = p.detach().double(), torch.randn(40)
    optimizer = optim.LAMB([p], lr=0.1, weight_decay=0.3, adam_w_mode=False, bias_correction=False)
    p.grad = g
    optimizer.step()
    coupled = g.double() + 0.3 * start
    u = 0.1 * coupled / ((0.001 * coupled**2).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), start - 0.1 * start.norm() / u.norm() * u, rtol=1e-5, atol=1e-6)
