"""`override`: settings of single parameters and modules, in any order of calls, and those that cannot be meant."""

from __future__ import annotations

import pytest
import torch

import kbit.optim as optim

from .models import model, train


def test_overrides_by_parameter_and_by_module():
    """bitsandbytes' override_config had no effect in some orders of calls (#1269, #1869): here any order works."""
    for late in (False, True):
        net = model()
        opt = optim.AdamW8bit(net.parameters(), lr=0.1, min_8bit_size=1)
        if late:
            train(net, opt, 2)
        opt.override(net[0], optim_bits=32)
        opt.override(net[2].weight, lr=0.0, weight_decay=0.0)
        frozen = net[2].weight.detach().clone()
        train(net, opt, 2)
        assert opt.state[net[0].weight]["exp_avg"].dtype == torch.float32
        assert "exp_avg_absmax" not in opt.state[net[0].weight]
        assert opt.state[net[2].bias]["exp_avg"].dtype == torch.uint8
        assert torch.equal(net[2].weight, frozen)
    with pytest.raises(ValueError, match="unknown settings"):
        opt.override(net[0], bits=8)
    with pytest.raises(ValueError, match="does not belong"):
        opt.override(torch.nn.Parameter(torch.ones(3)), lr=0.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda opt, net: opt.override("0.weight", lr=1.0), TypeError, "get_parameter"),
        (lambda opt, net: opt.override(3, lr=1.0), TypeError, "not 3"),
        (lambda opt, net: opt.override(["0.weight"], lr=1.0), TypeError, "holds '0.weight'"),
        (lambda opt, net: opt.override(net.named_parameters(), lr=1.0), TypeError, "tuple"),
        (lambda opt, net: opt.override(net[0].weight, lr="a"), ValueError, "lr='a'"),
        (lambda opt, net: opt.override(net[0].weight, betas="x"), ValueError, "betas: 'x'"),
        (lambda opt, net: opt.override(net[0].weight, optim_bits=4), ValueError, "optim_bits must be 8 or 32, not 4"),
        (lambda opt, net: opt.override(net[0].weight), ValueError, "needs a setting"),
        (lambda opt, net: opt.override(net[1], lr=1.0), ValueError, "Tanh has none that requires a gradient"),
        (lambda opt, net: opt.override([], lr=1.0), ValueError, "an empty list"),
        (
            lambda opt, net: opt.override(torch.nn.Sequential(net, torch.nn.Linear(2, 2)), lr=1.0),
            ValueError,
            "'1.weight'",
        ),
    ],
)
def test_overrides_that_cannot_be_meant_change_nothing(call, error, message):
    net = model()
    opt = optim.AdamW8bit(net.parameters())
    with pytest.raises(error, match=message):
        call(opt, net)
    assert not opt._overrides


def test_overrides_belong_to_one_optimizer():
    net = model()
    one, two = optim.AdamW8bit(net.parameters()), optim.AdamW8bit(net.parameters())
    one.override(net, optim_bits=32)
    train(net, two, 1)
    assert two.state[net[0].weight]["exp_avg"].dtype == torch.uint8


def test_override_keeps_the_schedule_of_other_settings():
    """An override of weight decay leaves the group's changing learning rate in force."""
    net, plain = model(), model()
    opt, ref = optim.AdamW(net.parameters(), lr=0.1), optim.AdamW(plain.parameters(), lr=0.1)
    opt.override(net, weight_decay=0.01)
    for optimizer, m in ((opt, net), (ref, plain)):
        train(m, optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.003
        train(m, optimizer, 2)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
