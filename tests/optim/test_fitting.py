"""Parameters, gradients and states that other code resized, replaced or cast: an error or the same values, no harm."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import kbit.optim as optim

SETTINGS = {"SGD8bit": {"lr": 0.1, "momentum": 0.9}, "SGD": {"lr": 0.1}}
BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.native)]


def stepped(name="AdamW8bit", shape=(100, 50), backend="auto", steps=2, **settings):
    """A parameter and its optimizer after some steps: the second one used what the first has kept."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    opt = getattr(optim, name)([p], **SETTINGS.get(name, {}), **settings)
    opt.backend = backend
    for _ in range(steps):
        p.grad = torch.randn_like(p)
        opt.step()
    return p, opt


def resize(p, shape, way):
    p.grad = None
    if way == "data":
        p.data = torch.randn(shape)
    elif way == "set_":
        with torch.no_grad():
            p.set_(torch.randn(shape))
    elif way == "view":  # smaller, at the same address
        p.data = p.data.view(-1)[: math.prod(shape)].view(shape)
    p.grad = torch.randn_like(p)


@pytest.mark.parametrize(
    ("shape", "way"),
    [((120, 50), "data"), ((120, 50), "set_"), ((60, 50), "data"), ((60, 50), "view"), ((0, 50), "data"), ((), "data")],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "SGD8bit", "Lion8bit", "AdEMAMix8bit", "Muon8bit"])
def test_a_resized_parameter_is_an_error_until_its_state_is_deleted(name, backend, shape, way):
    if name == "Muon8bit" and len(shape) != 2:
        return
    p, opt = stepped(name, backend=backend)
    before = {key: value.clone() for key, value in opt.state[p].items()}
    resize(p, shape, way)
    kept = p.detach().clone()
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"parameter 0 of group 0 has shape .*\(100, 50\).*Build a new optim.*del"
        ):
            opt.step()
    assert torch.equal(p, kept) and all(torch.equal(opt.state[p][key], value) for key, value in before.items())
    del opt.state[p]
    opt.step()
    assert opt.state[p]["step"].item() == 1 and all(
        value.shape == p.shape for key, value in opt.state[p].items() if key != "step" and "absmax" not in key
    )


def test_errors_name_group_and_parameter():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 70))
    opt = optim.AdamW8bit([{"params": list(layer.named_parameters())} for layer in net])
    for _ in range(2):
        net(torch.ones(1, 70)).sum().backward()
        opt.step()
    resize(net[1].bias, (71,), "data")
    with pytest.raises(RuntimeError, match=r"parameter 1 \(bias\) of group 1 has shape \(71,\) .* \(70,\)"):
        opt.step()


def test_a_parameter_without_states_may_be_resized():
    p, opt = stepped("SGD")
    resize(p, (300, 50), "data")
    expected = p.detach() - 0.1 * p.grad
    opt.step()
    torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_another_size_is_an_error(name, backend):
    p, opt = stepped(name, backend=backend)
    p.grad = torch.randn_like(p)
    p.grad.data = torch.randn(10)
    with pytest.raises(RuntimeError, match=r"shape \(100, 50\) .* its gradient \(10,\)"):
        opt.step()
    p.grad = torch.randn_like(p)
    opt.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(exp_avg=s["exp_avg"][:10].clone()), r"now, but its state 'exp_avg' \(10, 50\)"),
        (lambda s: s.update(exp_avg_sq=s["exp_avg_sq"][:10].clone()), r"now, but its state 'exp_avg_sq' \(10, 50\)"),
        (lambda s: setattr(s["exp_avg_sq"], "data", s["exp_avg_sq"][:10].clone()), r"'exp_avg_sq' \(10, 50\)"),
        (lambda s: s.update(exp_avg_absmax=s["exp_avg_absmax"][:1].clone()), r"needs 20 fp32 block scales.*\(1,\)"),
        (lambda s: setattr(s["exp_avg_sq_absmax"], "data", torch.ones(1)), r"'exp_avg_sq' .* needs 20 .*\(1,\)"),
        (lambda s: s.pop("exp_avg_absmax"), "needs 20 fp32 block scales 'exp_avg_absmax' .* has none"),
        (lambda s: s.update(exp_avg=s["exp_avg"].int()), "'exp_avg' of parameter 0 of group 0 is torch.int32"),
        (
            lambda s: s.update(exp_avg=s["exp_avg"].float()),
            "beside block scales 'exp_avg_absmax': 8-bit codes were cast",
        ),
        (lambda s: s.update(exp_avg=s["exp_avg"].to("meta")), "has no memory"),
        (lambda s: s["exp_avg"].untyped_storage().resize_(0), "has no memory"),
        (lambda s: s.update(step=torch.ones(2)), "'step' of parameter 0 of group 0 is tensor.*not one number"),
        (lambda s: s.update(step="one"), "'step' of parameter 0 of group 0 is 'one'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_do_not_fit_are_an_error(change, message, backend):
    p, opt = stepped(backend=backend)
    change(opt.state[p])
    kept = p.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert torch.equal(p, kept)


def cast(state, dtype):
    state.update({key: value.to(dtype) for key, value in state.items() if key.startswith("exp_avg")})


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update({key: value.T.contiguous().T for key, value in s.items() if value.dim() == 2}),
        lambda s: s.update({key: value.double() for key, value in s.items() if value.dtype == torch.float32}),
        lambda s: s.update({key: value.repeat(2)[: len(value)] for key, value in s.items() if value.dim() == 1}),
        lambda s: s.update(step=3),
        lambda s: s.update(step=torch.tensor([3])),
        lambda s: [setattr(value, "data", value.clone()) for value in s.values()],
        lambda s: s.update(mine=1),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
def test_states_with_the_same_values_go_on_alike(change, backend, name):
    results = []
    for function in (lambda s: None, change):
        p, opt = stepped(name, backend=backend, steps=3)
        function(opt.state[p])
        for _ in range(2):
            p.grad = torch.randn_like(p)
            opt.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_of_16_bits_become_fp32(dtype):
    p, opt = stepped("AdamW32bit")
    cast(opt.state[p], dtype)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == torch.float32 and p.isfinite().all()


def test_a_parameter_that_was_transposed_in_place_is_read_anew():
    p, opt = stepped(shape=(80, 80))
    twin, other = copy.deepcopy((p, opt))
    p.data, p.grad = p.data.T, torch.randn(80, 80)
    twin.data, twin.grad = twin.data.T.contiguous(), p.grad.clone()
    opt.step()
    other.step()
    assert torch.equal(p, twin)


def test_a_parameter_on_the_meta_device_is_an_error_that_says_so():
    p = nn.Parameter(torch.empty(8, 8, device="meta"))
    opt = optim.AdamW8bit([p])
    p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 is on the meta device.*to_empty"):
        opt.step()


def test_a_parameter_listed_twice_takes_two_steps_as_in_torch():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(300, 40))
    q = nn.Parameter(p.detach().clone())
    with pytest.warns(UserWarning, match="duplicate"):
        ours, theirs = optim.AdamW([p, p], lr=0.1), torch.optim.AdamW([q, q], lr=0.1)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert ours.state[p]["step"].item() == 6
    torch.testing.assert_close(p, q)


# ---- values ----


@pytest.mark.parametrize("way", ["load", "override"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW", "AdEMAMix", "Lion", "Adagrad"])
def test_what_is_not_finite_starts_anew_in_8_bits(name, backend, way):
    """One element of a block of 256; the others of its block go on."""
    p, wide = stepped(f"{name}32bit", backend=backend)
    key = next(iter(key for key in wide.state[p] if key != "step"))
    wide.state[p][key].view(-1)[300] = math.nan
    for other in wide.state[p].keys() - {"step", key}:
        wide.state[p][other].view(-1)[[300, 700]] = math.inf
    count = 2 if name in ("AdamW", "AdEMAMix") else 1
    opt = wide
    if way == "load":
        opt = getattr(optim, f"{name}8bit")([p])
        opt.load_state_dict(wide.state_dict())
    else:
        opt.override(p, optim_bits=8)
    kept, p.grad = p.detach().clone(), torch.randn_like(p)
    with pytest.warns(UserWarning, match=f"parameter 0 of group 0: {count} of 5000 elements .* NaN or infinite"):
        opt.step()
    assert opt.state[p][key].dtype == torch.uint8
    assert p.isfinite().all() and (p != kept).float().mean() > 0.9 and (p - kept).abs().max() < 0.05
    again = getattr(optim, f"{name}8bit")([p])
    again.load_state_dict(opt.state_dict())


def test_codes_that_were_cast_to_numbers_are_not_loaded():
    p, opt = stepped()
    saved = opt.state_dict()
    saved["state"][0] = {key: value.float() for key, value in saved["state"][0].items()}
    for name in ("AdamW8bit", "AdamW32bit"):
        fresh = getattr(optim, name)([p])
        with pytest.raises(ValueError, match="'exp_avg' of parameter 0 of group 0 holds 8-bit codes as torch.float32"):
            fresh.load_state_dict(saved)
        assert not fresh.state


def test_compensation_that_nobody_uses_is_dropped():
    p = nn.Parameter(torch.randn(70, 100).bfloat16())
    opt, plain = optim.AdamW8bit([p], kahan=True), optim.AdamW8bit([p])
    p.grad = torch.randn_like(p)
    opt.step()
    plain.load_state_dict(opt.state_dict())
    plain.step()
    assert "compensation" in opt.state[p] and "compensation" not in plain.state[p]


@pytest.mark.parametrize("wrong", [{"lr": True}, {"is_paged": 1}, {"skip_zeros": 0}, {"kahan": 1}])
def test_flags_are_flags_and_numbers_are_numbers(wrong):
    with pytest.raises(ValueError, match="invalid (learning rate|is_paged|skip_zeros|kahan)"):
        optim.AdamW([nn.Parameter(torch.randn(8))], **wrong)
