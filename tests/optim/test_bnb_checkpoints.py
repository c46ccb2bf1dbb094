"""Checkpoints that bitsandbytes 0.50 wrote load, and training goes on from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kbit.optim as optim
from kbit.formats.blocks import dequantize_dynamic

GOLDEN = Path(__file__).parent / "golden" / "bnb_adamw8bit.pt"


def decoded(state: dict, name: str, signed: bool) -> torch.Tensor:
    if state[name].dtype != torch.uint8:
        return state[name]
    return dequantize_dynamic(state[name], state[name + "_absmax"], signed, 256, torch.float32)


def test_golden_checkpoint():
    saved = torch.load(GOLDEN, weights_only=True)
    assert "__bnb_optimizer_quant_state__" in saved["optimizer"]["state"][0]
    params = [torch.nn.Parameter(p.clone()) for p in saved["params"]]
    optimizer = optim.AdamW8bit(params)
    optimizer.load_state_dict(saved["optimizer"])
    group = optimizer.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.02, (0.8, 0.95), 0.1)
    state = optimizer.state[params[0]]
    assert int(state["step"]) == 3 and state["exp_avg"].dtype == torch.uint8
    wrapped = saved["optimizer"]["state"][0]["__bnb_optimizer_quant_state__"]
    assert torch.equal(state["exp_avg"], wrapped["state1"]) and torch.equal(state["exp_avg_sq"], wrapped["state2"])
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        assert torch.equal(decoded(state, name, signed), saved["decoded"][name])
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float32
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize(
    ("name", "settings", "signs"),
    [
        ("Adam8bit", {}, {"exp_avg": True, "exp_avg_sq": False}),
        ("AdamW32bit", {}, {"exp_avg": True, "exp_avg_sq": False}),
        ("PagedAdamW8bit", {}, {"exp_avg": True, "exp_avg_sq": False}),
        ("Lion8bit", {}, {"exp_avg": True}),
        ("SGD8bit", {"lr": 0.01, "momentum": 0.8}, {"momentum_buffer": True}),
        ("RMSprop8bit", {"alpha": 0.9}, {"square_avg": False}),
        ("Adagrad8bit", {}, {"sum": False}),
        ("AdEMAMix", {}, {"exp_avg": True, "exp_avg_slow": True, "exp_avg_sq": False}),
        ("AdEMAMix8bit", {}, {"exp_avg": True, "exp_avg_slow": True, "exp_avg_sq": False}),
    ],
)
def test_live_checkpoint_continues_as_bitsandbytes_would(name, settings, signs, tmp_path):
    theirs = pytest.importorskip("bitsandbytes").optim
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(70, 100))
    reference = getattr(theirs, name)([p], **settings)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        reference.step()
    torch.save(reference.state_dict(), tmp_path / "optimizer.pt")
    twin = torch.nn.Parameter(p.detach().clone())
    optimizer = getattr(optim, name)([twin], **settings)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    group = optimizer.param_groups[0]
    for key, value in settings.items():
        assert group[key] == value, key
    source = reference.state[p]
    parts = []
    for number in (1, 2):
        if f"state{number}" in source:
            values = source[f"state{number}"].float()
            if f"absmax{number}" in source:
                codes, scales = source[f"state{number}"], source[f"absmax{number}"]
                values = source[f"qmap{number}"][codes.long()].reshape(-1, 7000)
                values = values * scales.reshape(len(values), -1).repeat_interleave(256, dim=1)[:, :7000]
            parts += list(values.reshape(-1, 70, 100))
    for (state_name, signed), values in zip(signs.items(), parts, strict=True):
        ours = decoded(optimizer.state[twin], state_name, signed)
        assert (ours - values).norm() <= 0.02 * values.norm(), state_name
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    twin.grad = p.grad.clone()
    reference.step()
    optimizer.step()
    agree = (twin.detach() - p.detach()).norm() / (p.detach() - before).norm()
    assert agree < 0.05


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("block", [256, 2048])
def test_second_moments_that_were_rounded_away_get_the_smallest_code(bits, block):
    """Codes of 0 beside momentum, as a large gradient leaves them in its block: the next step must not be large."""
    saved = torch.load(GOLDEN, weights_only=True)
    wrapped = saved["optimizer"]["state"][0]["__bnb_optimizer_quant_state__"]
    momentum = wrapped["qmap1"][wrapped["state1"].long()] != 0
    lost = torch.arange(wrapped["state2"].numel()).view_as(momentum) % 3 == 0
    wrapped["state2"][lost] = 0
    wrapped["state1"].view(-1)[:30] = 127
    momentum.view(-1)[:30] = False
    if block == 2048:
        wrapped |= {"absmax1": wrapped["absmax1"][:3].clone(), "absmax2": wrapped["absmax2"][:3].clone()}
    params = [torch.nn.Parameter(p.clone()) for p in saved["params"]]
    optimizer = optim.AdamW(params, optim_bits=bits)
    optimizer.load_state_dict(saved["optimizer"])
    state = optimizer.state[params[0]]
    if bits == 8 and block == 256:
        assert torch.equal(state["exp_avg_sq"], torch.where(lost & momentum, 1, wrapped["state2"]))
    squares = decoded(state, "exp_avg_sq", False)
    assert (squares > 0)[lost & momentum].all() and (squares == 0)[lost & ~momentum].all()
    smallest = wrapped["qmap2"][1] * wrapped["absmax2"].repeat_interleave(block)[: squares.numel()]
    torch.testing.assert_close(squares.view(-1)[lost.view(-1) & momentum.view(-1)],
                               smallest[lost.view(-1) & momentum.view(-1)])  # fmt: skip


def test_old_layouts_are_read_or_refused():
    """Blocks of 2,048 (before 0.44) are re-quantized; states without block scales are refused with the remedy."""
    saved = torch.load(GOLDEN, weights_only=True)
    wrapped = saved["optimizer"]["state"][0].pop("__bnb_optimizer_quant_state__")
    wide = {**wrapped, "absmax1": torch.tensor([1.0, 2.0, 3.0]), "absmax2": torch.tensor([1.0, 2.0, 3.0])}
    saved["optimizer"]["state"][0].update(wide)
    params = [torch.nn.Parameter(p.clone()) for p in saved["params"]]
    optimizer = optim.AdamW8bit(params)
    optimizer.load_state_dict(saved["optimizer"])
    values = wrapped["qmap1"][wrapped["state1"].long()].view(-1)
    values = values * torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(2048)[:5000]
    ours = decoded(optimizer.state[params[0]], "exp_avg", True).view(-1)
    assert (ours - values).norm() < 0.02 * values.norm()
    saved["optimizer"]["state"][0]["absmax1"] = None
    with pytest.raises(ValueError, match="not block-wise"):
        optimizer.load_state_dict(saved["optimizer"])
