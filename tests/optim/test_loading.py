"""Loading optimizer checkpoints: exactly with overrides to 32 bits, out to torch, and nothing that does not fit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import kbit.optim as optim
from kbit.integrations.bitsandbytes import optim as dropin
from kbit.integrations.bitsandbytes.optim_manager import GlobalOptimManager


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 8))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randint(100, (16,), generator=generator)).square().mean().backward()
        optimizer.step()


def same(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            if not torch.equal(p, q) or one.state[p].keys() != other.state[q].keys():
                return False
            if not all(torch.equal(v, other.state[q][key]) for key, v in one.state[p].items()):
                return False
    return True


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit", "PagedAdamW8bit"])
@pytest.mark.parametrize("when", ["before loading", "after loading"])
def test_a_run_with_an_override_to_32_bits_resumes_exactly(name, when):
    net = model()
    opt = getattr(optim, name)(net.parameters(), lr=1e-2)
    opt.override(net[0], optim_bits=32)
    train(net, opt, 3)
    twin, saved = copy.deepcopy(net), copy.deepcopy(opt.state_dict())
    train(net, opt, 3, seed=1)
    resumed = getattr(optim, name)(twin.parameters(), lr=1e-2)
    if when == "before loading":
        resumed.override(twin[0], optim_bits=32)
    resumed.load_state_dict(saved)
    if when == "after loading":
        resumed.override(twin[0], optim_bits=32)
    train(twin, resumed, 3, seed=1)
    assert opt.state[net[0].weight]["exp_avg"].dtype == torch.float32
    assert opt.state[net[1].weight]["exp_avg"].dtype == torch.uint8
    assert same(opt, resumed)


@pytest.mark.parametrize("when", ["before loading", "after loading"])
def test_the_managers_overrides_resume_exactly(when):
    """As Trainer has it: the manager knows of the embedding before the checkpoint comes; or only then."""
    manager = GlobalOptimManager.get_instance()
    net = model()
    opt = dropin.AdamW(net.parameters(), lr=1e-2, optim_bits=8)
    manager.register_module_override(net[0], "weight", {"optim_bits": 32})
    train(net, opt, 3)
    twin, saved = copy.deepcopy(net), copy.deepcopy(opt.state_dict())
    train(net, opt, 3, seed=1)
    resumed = dropin.AdamW(twin.parameters(), lr=1e-2, optim_bits=8)
    for now in ("before loading", "after loading"):
        if now == when:
            manager.register_module_override(twin[0], "weight", {"optim_bits": 32})
        if now == "before loading":
            resumed.load_state_dict(saved)
    train(twin, resumed, 3, seed=1)
    assert opt.state[net[0].weight]["exp_avg"].dtype == torch.float32 and same(opt, resumed)


def test_loading_and_saving_without_a_step_loses_nothing():
    net = model()
    wide = optim.AdamW32bit(net.parameters())
    train(net, wide, 2)
    narrow = optim.AdamW8bit(net.parameters())
    narrow.load_state_dict(wide.state_dict())
    again = optim.AdamW32bit(net.parameters())
    again.load_state_dict(narrow.state_dict())
    assert same(wide, again)
    narrow.zero_grad()
    narrow.step()  # no gradients, no step
    assert narrow.state[net[1].weight]["exp_avg"].dtype == torch.float32
    train(net, narrow, 1)
    assert narrow.state[net[1].weight]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad"])
def test_8_bit_states_reach_torch_through_the_32_bit_form(name, tmp_path):
    """The way out: 8 bits -> `X32bit` -> torch.optim's X, which goes on as `X32bit` would, settings included."""
    settings = {"lr": 1e-2, "weight_decay": 0.1, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    net = model()
    narrow = getattr(optim, f"{name}8bit")(net.parameters(), **settings)
    train(net, narrow, 3)
    wide = getattr(optim, f"{name}32bit")(net.parameters(), lr=1.0)
    wide.load_state_dict(narrow.state_dict())
    torch.save(wide.state_dict(), tmp_path / "optimizer.pt")
    twin = copy.deepcopy(net)
    theirs = getattr(torch.optim, name)(twin.parameters(), lr=1.0)
    theirs.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert {key: theirs.param_groups[0][key] for key in settings} == settings
    train(net, wide, 3, seed=1)
    train(twin, theirs, 3, seed=1)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- whose states are these? ----

# bitsandbytes' name -> settings, and the algorithms of ours that load it. Their groups do not tell the three apart.
ADAMS = ("Adam", "AdamW", "LAMB")
OF_BNB = {
    "Adam": ({}, ADAMS),
    "AdamW": ({}, ADAMS),
    "LAMB": ({}, ADAMS),
    "AdEMAMix": ({}, ("AdEMAMix",)),
    "Lion": ({}, ("Lion",)),
    "SGD": ({"lr": 0.01, "momentum": 0.9}, ("SGD", "LARS")),
    "LARS": ({"lr": 0.01, "momentum": 0.9}, ("SGD", "LARS")),
    "RMSprop": ({}, ("RMSprop",)),
    "Adagrad": ({}, ("Adagrad",)),
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", OF_BNB)
def test_states_of_another_algorithm_of_bitsandbytes_are_refused(name, steps):
    theirs = pytest.importorskip("bitsandbytes").optim
    settings, fitting = OF_BNB[name]
    p = nn.Parameter(torch.randn(70, 100))
    source = getattr(theirs, name)([p], **settings)
    p.grad = torch.randn_like(p)
    for _ in range(steps):
        source.step()
    saved = source.state_dict()
    for other, (mine, _) in OF_BNB.items():
        opt = getattr(optim, other)([p], **mine)
        if other == "LARS" and other in fitting and steps:
            # The buffer of theirs holds whole gradients, which ours would not scale: steps would be far too large.
            with pytest.raises(ValueError, match="parameter 0 of group 0 is a buffer of whole gradients"):
                opt.load_state_dict(saved)
            continue
        if other in fitting:
            opt.load_state_dict(saved)
            assert len(opt.state) == steps
            continue
        with pytest.raises(ValueError, match=f"parameter group 0: .* bitsandbytes' of .*betas=.*{other} is"):
            opt.load_state_dict(saved)
        assert not opt.state


def test_second_moments_that_are_negative_are_not_loaded():
    """What no setting tells: a signed momentum as RMSprop's average of squares would give NaN."""
    p = nn.Parameter(torch.randn(70, 100))
    opt = optim.RMSprop([p])
    p.grad = torch.randn_like(p)
    opt.step()
    saved = opt.state_dict()
    saved["state"][0] = {**saved["state"][0], "square_avg": torch.randn(70, 100)}
    with pytest.raises(ValueError, match="'square_avg' of parameter 0 of group 0 holds negative values"):
        opt.load_state_dict(saved)


# ---- values ----


def _absmax(value):
    def change(state):
        state["exp_avg_absmax"] = state["exp_avg_absmax"].clone()
        state["exp_avg_absmax"].view(-1)[1] = value

    return change


def _replace(key, function):
    def change(state):
        state[key] = function(state[key])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_absmax(math.nan), "'exp_avg_absmax'.*negative, infinite or NaN"),
        (_absmax(math.inf), "'exp_avg_absmax'.*negative, infinite or NaN"),
        (_absmax(-1.0), "'exp_avg_absmax'.*negative, infinite or NaN"),
        (_replace("exp_avg_absmax", lambda t: t[:-1]), "'exp_avg' .*needs 25 block scales"),
        (_replace("exp_avg_absmax", lambda t: None), "'exp_avg' .*needs 25 block scales"),
        (_replace("exp_avg", lambda t: t.long()), "'exp_avg' .*int64"),
        (_replace("exp_avg", lambda t: t.bool()), "'exp_avg' .*bool"),
        (_replace("exp_avg", lambda t: t.tolist()), "'exp_avg' .*list, not a tensor"),
        (_replace("exp_avg", lambda t: t[:-1]), "'exp_avg' .*shape"),
        (_replace("exp_avg_sq", lambda t: None), "no 'exp_avg_sq'"),
        (lambda state: state.pop("exp_avg_sq"), "no 'exp_avg_sq'"),
        (lambda state: state.pop("step"), "no 'step'"),
        (_replace("step", lambda t: t - 3), "'step' .*whole number"),
        (_replace("step", lambda t: t + 0.5), "'step' .*whole number"),
        (_replace("step", lambda t: t * math.nan), "'step' .*whole number"),
        (_replace("step", lambda t: torch.ones(2)), "'step' .*whole number"),
        (_replace("step", lambda t: "three"), "'step' .*whole number"),
        (lambda state: state.update(compensation=torch.ones(3)), "'compensation' .*shape"),
        (lambda state: state.update(max_exp_avg_sq=torch.ones(64, 100)), "holds max_exp_avg_sq"),
    ],
)
def test_damaged_states_are_refused_and_change_nothing(change, message):
    """The second group's first parameter is damaged; what came before it must not have been loaded either."""
    net = model()
    groups = [{"params": net[:1].named_parameters()}, {"params": net[1:].named_parameters()}]
    opt = optim.AdamW8bit(groups, lr=0.01)
    train(net, opt, 1)
    before = copy.deepcopy(opt.state_dict())
    other = copy.deepcopy(before)
    for state in other["state"].values():
        state["step"] = state["step"] + 1
    other["param_groups"][0]["lr"] = 0.5
    change(other["state"][1])
    with pytest.raises(ValueError, match=message) as caught:
        opt.load_state_dict(other)
    assert "parameter 1 (1.weight) of group 1" in str(caught.value)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())


def test_a_state_dict_of_the_wrong_form_is_refused():
    net = model()
    opt = optim.AdamW8bit(net.parameters())
    train(net, opt, 1)
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="state of parameter 2 of group 0 is a list"):
        opt.load_state_dict({**saved, "state": {**saved["state"], 2: []}})
    for state, groups in ((saved["state"], None), ([], saved["param_groups"]), (saved["state"], {0: 1})):
        with pytest.raises(ValueError, match="'state' must be a dict and 'param_groups' a list"):
            opt.load_state_dict({"state": state, "param_groups": groups})
    for group in (3, {}, {"params": 5}):
        with pytest.raises(ValueError, match="parameter group 0 .*has no 'params'"):
            opt.load_state_dict({"state": saved["state"], "param_groups": [group]})
    twice = [{**saved["param_groups"][0], "params": [0, 1, 2, 3, 3]}]
    with pytest.raises(ValueError, match="parameter group 0 .*lists parameter 3 again"):
        opt.load_state_dict({**saved, "param_groups": twice})


def test_parameters_that_never_had_a_gradient_have_no_state_and_load():
    net = model()
    opt = optim.AdamW8bit(net.parameters())
    net[1].requires_grad_(False)
    train(net, opt, 2)
    other = optim.AdamW8bit(net.parameters())
    other.load_state_dict(opt.state_dict())
    net[1].requires_grad_(True)
    train(net, other, 1)
    assert int(other.state[net[1].weight]["step"]) == 1 and int(other.state[net[0].weight]["step"]) == 3


def test_settings_are_copied():
    """A learning rate in a tensor, changed in place by one optimizer's scheduler, is not the other's."""
    net = model()
    opt = optim.AdamW8bit(net.parameters(), lr=torch.tensor(0.1))
    other = optim.AdamW8bit(net.parameters(), lr=torch.tensor(0.5))
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"].item() == pytest.approx(0.1)
    opt.param_groups[0]["lr"].fill_(7.0)
    assert other.param_groups[0]["lr"].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("state1", [1], "'state1' of parameter 0 of group 0 is a list"),
        ("state1", torch.zeros(128, 64, dtype=torch.int64), "'exp_avg' .*int64"),
        ("state1", torch.zeros(5), "has 5 elements, not 8192"),
        ("state2", torch.full((128, 64), -1.0), "'exp_avg_sq' .*negative values"),
        ("absmax1", [1], "'absmax1' .*list"),
        ("absmax1", torch.ones(3), "3 block scales and a map of 256"),
        ("absmax1", torch.full((32,), math.nan), "negative, infinite or NaN"),
        ("absmax2", -torch.ones(32), "negative, infinite or NaN"),
        ("qmap1", torch.ones(3), "a map of 3 entries"),
        ("qmap1", None, "not block-wise"),
        (None, [1], "is a list, not a dict"),
    ],
)
def test_damaged_states_of_bitsandbytes_are_refused(key, value, message):
    state = {"state1": torch.zeros(128, 64, dtype=torch.uint8), "state2": torch.zeros(128, 64, dtype=torch.uint8)}
    state |= {"absmax1": torch.ones(32), "absmax2": torch.ones(32)}
    state |= {"qmap1": torch.linspace(-1, 1, 256), "qmap2": torch.linspace(0, 1, 256)}
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0, "alpha": 0.0, "params": [0]}
    opt = optim.AdamW8bit([nn.Parameter(torch.randn(128, 64))])
    wrapped = "__bnb_optimizer_quant_state__"
    opt.load_state_dict({"state": {0: {"step": 1, wrapped: state}}, "param_groups": [group]})
    damaged = {**state, key: value} if key else value
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict({"state": {0: {"step": 2, wrapped: damaged}}, "param_groups": [group]})
    assert [int(held["step"]) for held in opt.state.values()] == [1]
