"""Muon8bit against torch.optim.Muon, and its AdamW groups."""

from __future__ import annotations

import pytest
import torch

import kbit.optim as optim


@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "lr": 0.01}])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_32_bits_equal_torch(settings, shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    a, b = optim.Muon32bit([ours], **settings), torch.optim.Muon([theirs], **settings)
    for _ in range(20):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_8_bits_follow_32_bits_and_learn():
    torch.manual_seed(0)
    inputs, truth = torch.randn(256, 64), torch.randn(64, 96)
    losses = {}
    for name in ("Muon8bit", "Muon32bit"):
        p = torch.nn.Parameter(torch.zeros(64, 96))
        optimizer = getattr(optim, name)([p], lr=0.3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=100)
        for _ in range(100):
            optimizer.zero_grad()
            loss = (inputs @ p - inputs @ truth).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses[name] = loss.item()
        assert (optimizer.state[p]["momentum_buffer"].dtype == torch.uint8) == (name == "Muon8bit")
    assert losses["Muon8bit"] < 0.05 * 64
    assert losses["Muon8bit"] < 1.2 * losses["Muon32bit"] + 0.05


def test_groups_that_are_no_matrices_get_adamw():
    net = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.Linear(100, 4))
    with pytest.raises(ValueError, match=r"shape \(100,\).*use_muon"):
        optim.Muon8bit(net.parameters())
    biases = [net[0].bias, net[1].bias]
    opt = optim.Muon8bit([{"params": [net[0].weight, net[1].weight]}, {"params": biases, "use_muon": False}], lr=0.01)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in biases]
    ref = torch.optim.AdamW(twin, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        net.zero_grad()
        net(torch.randn(8, 64)).square().sum().backward()
        for p, q in zip(biases, twin, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        ref.step()
    for p, q in zip(biases, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    other = optim.Muon8bit([{"params": [net[0].weight, net[1].weight]}, {"params": biases, "use_muon": False}])
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.state[net[0].weight]["momentum_buffer"], opt.state[net[0].weight]["momentum_buffer"])


def test_a_gradient_that_is_not_finite_leaves_the_matrix_alone():
    p = torch.nn.Parameter(torch.randn(80, 80))
    optimizer = optim.Muon8bit([p])
    p.grad = torch.randn(80, 80)
    optimizer.step()
    before, codes = p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()
    p.grad[3, 4] = float("nan")
    optimizer.step()
    assert torch.equal(p, before)
    assert (optimizer.state[p]["momentum_buffer"].int() - codes.int()).abs().max() <= 2


@pytest.mark.parametrize("option", ["kahan", "stochastic_rounding", "skip_zeros", "max_unorm"])
def test_options_that_a_whole_matrix_cannot_have_are_refused(option):
    matrix, bias = torch.nn.Parameter(torch.ones(4, 4).bfloat16()), torch.nn.Parameter(torch.ones(4).bfloat16())
    groups = [{"params": [matrix]}, {"params": [bias], "use_muon": False, option: True}]
    opt = optim.Muon8bit(groups)  # AdamW's groups can
    assert opt.param_groups[1][option] and not opt.param_groups[0][option]
    bias.grad = torch.ones_like(bias)
    opt.step()
    for wrong in (lambda: optim.Muon8bit([matrix], **{option: True}), lambda: opt.override(matrix, **{option: True})):
        with pytest.raises(ValueError, match=f"{option}=True is not for Muon.*use_muon"):
            wrong()


def test_a_vector_cannot_be_given_to_muon_by_an_override():
    matrix, vector = torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(8))
    opt = optim.Muon([{"params": [matrix]}, {"params": [vector], "use_muon": False}])
    with pytest.raises(ValueError, match="Muon is for matrices"):
        opt.override(vector, use_muon=True)
