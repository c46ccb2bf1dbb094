"""Keys of parameter groups, arguments that a class's name fixes, and ranges of learning rates and momenta."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kbit.optim as optim
from kbit.integrations.bitsandbytes import optim as dropin


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 8))


# ---- keys of a parameter group ----


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", 0.1, "no setting 'learning_rate'.*its settings are betas"),
        ("weight_decays", 0.1, "no setting 'weight_decays'"),
        ("momentum", 0.9, "no setting 'momentum'"),
        ("rank", 8, "'name' or '_rank'"),
        ("fused", True, "'fused'.*leave it out"),
        ("foreach", True, "'foreach'.*leave it out"),
        ("capturable", True, "'capturable'.*CUDA graph"),
        ("maximize", True, "'maximize'.*negate the loss"),
        ("differentiable", True, "'differentiable'.*torch.optim"),
        ("percentile_clipping", 5, "clip_grad_norm_"),
        ("decoupled_weight_decay", False, "no setting 'decoupled_weight_decay'"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_key_that_is_no_setting_is_refused(key, value, message, late):
    """It would have passed without a word and without effect."""
    group = {"params": [matrix()], key: value}
    opt = optim.AdamW8bit([matrix()])
    with pytest.raises(TypeError, match=message):
        opt.add_param_group(group) if late else optim.AdamW8bit([group])
    assert len(opt.param_groups) == 1


def test_amsgrad_of_a_group_is_refused_as_the_argument_is():
    for kind in (optim.AdamW, optim.SGD32bit, dropin.AdamW):
        with pytest.raises(ValueError, match="amsgrad=True"):
            kind([{"params": [matrix()], "amsgrad": True}], lr=0.1)


@pytest.mark.parametrize(
    "extra",
    [
        {"name": "decay", "lr_scale": 0.5, "layer_id": 3, "_mine": ("a", 1)},
        {"initial_lr": 0.1, "swa_lr": 0.2, "max_lr": 1.0, "min_lr": 0.0, "base_momentum": 0.8, "max_momentum": 0.9},
        {"amsgrad": False, "maximize": False, "foreach": None, "fused": None, "capturable": False},
        {"optim_bits": 32, "kahan": True, "min_8bit_size": 1},
    ],
)
def test_labels_schedulers_keys_and_what_asks_for_nothing_are_kept(extra):
    opt = optim.AdamW8bit([{"params": [matrix()], **extra}])
    assert extra.items() <= opt.param_groups[0].items()
    opt.load_state_dict(opt.state_dict())
    assert extra.items() <= opt.param_groups[0].items()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Muon"])
def test_groups_of_torch_and_our_own_construct_an_optimizer(name):
    settings = {"lr": 0.05, "weight_decay": 0.1}
    theirs = getattr(torch.optim, name)([matrix()], **settings)
    torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.1, total_steps=10, cycle_momentum=False)
    ours = getattr(optim, name)(theirs.param_groups, lr=1.0)
    assert ours.param_groups[0]["initial_lr"] == theirs.param_groups[0]["initial_lr"]
    assert getattr(optim, name)(ours.param_groups, lr=1.0).param_groups[0]["weight_decay"] == 0.1


def test_off_switches_of_torch_are_arguments_too():
    optim.AdamW8bit([matrix()], fused=False, foreach=None, maximize=False)
    with pytest.raises(TypeError, match="'fused'"):
        optim.AdamW8bit([matrix()], fused=True)


def test_labels_of_any_name_pass_through_the_drop_in():
    """bitsandbytes takes them; settings that it ignored, and torch obeys, are refused all the same."""
    opt = dropin.AdamW8bit([{"params": [matrix()], "is_lora_plus": True, "rank": 8}])
    assert opt.param_groups[0]["rank"] == 8
    with pytest.raises(TypeError, match="maximize"):
        dropin.AdamW8bit([{"params": [matrix()], "maximize": True}])


# ---- what the name of a class fixes ----

EIGHT = [name for name in optim.__all__ if name.endswith("8bit")]
PAGED = [name for name in optim.__all__ if name.startswith("Paged")]


@pytest.mark.parametrize("name", EIGHT)
def test_8_bit_classes_take_bitsandbytes_default_and_nothing_else(name):
    settings = {"lr": 0.1}
    for bits in (8, 32):  # 32 is what bitsandbytes' Adam8bit has as its default, and ignores
        assert getattr(optim, name)([matrix()], optim_bits=bits, **settings).param_groups[0]["optim_bits"] == 8
    for bits in (4, 16, "8", None):
        with pytest.raises(ValueError, match=f"{name} has 8-bit states, and optim_bits={bits!r}"):
            getattr(optim, name)([matrix()], optim_bits=bits, **settings)


def test_32_bit_classes_refuse_other_bits():
    assert optim.AdamW32bit([matrix()], optim_bits=32).param_groups[0]["optim_bits"] == 32
    with pytest.raises(ValueError, match="AdamW32bit has 32-bit states, and optim_bits=8.*AdamW with"):
        optim.AdamW32bit([matrix()], optim_bits=8)


@pytest.mark.parametrize("name", PAGED)
def test_is_paged_is_a_flag_where_the_name_decides_too(name):
    assert getattr(optim, name)([matrix()], is_paged=False).param_groups[0]["is_paged"] is True
    with pytest.raises(ValueError, match="is_paged: 'x'"):
        getattr(optim, name)([matrix()], is_paged="x")


# ---- ranges ----


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_learning_rate_in_a_tensor_has_its_range(value):
    rate = torch.tensor(value)
    with pytest.raises(ValueError, match=f"learning rate: lr={value}"):
        optim.AdamW([matrix()], lr=rate)
    opt = optim.AdamW([p := matrix()], lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match="learning rate"):
        opt.add_param_group({"params": [matrix()], "lr": rate})
    with pytest.raises(ValueError, match="learning rate"):
        opt.override(p, lr=rate)
    assert len(opt.param_groups) == 1 and opt.param_groups[0]["lr"].item() == pytest.approx(0.1)


@pytest.mark.parametrize("momentum", [1.0, 1.5, -0.1, float("nan")])
def test_muons_momentum_is_the_decay_of_an_average(momentum):
    with pytest.raises(ValueError, match="momentum"):
        optim.Muon([matrix()], momentum=momentum)
    optim.SGD([matrix()], lr=0.1, momentum=1.0)  # a sum in torch, of any weight


# ---- what the guide says ----

COMMON = {"self", "params", "args", "amsgrad", "options", "unknown", "defaults"}


def test_the_guides_tables_of_settings_are_complete_and_right():
    text = (Path(__file__).parents[2] / "docs" / "guide-optimizers.md").read_text()
    text = text.split("## Settings and their defaults")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    common = {cells[0].strip("`"): cells[1].strip("`") for cells in rows if len(cells) == 3}
    base = inspect.signature(optim.KbitOptimizer.__init__).parameters
    assert common == {name: repr(p.default) for name, p in base.items() if name not in COMMON}
    of_class = {cells[0].strip("`"): re.findall(r"`([^`]+)`", cells[1]) for cells in rows if len(cells) == 2}
    algorithms = {name for name in optim.__all__ if not name.startswith("Paged") and not name.endswith("bit")}
    assert of_class.keys() == algorithms - {"KbitOptimizer"}
    for name, settings in of_class.items():
        own = inspect.signature(getattr(optim, name).__init__).parameters
        known = {n: p.default for n, p in own.items() if n not in COMMON | common.keys() or n == "max_unorm"}
        assert settings == [n if d is inspect.Parameter.empty else f"{n}={d!r}" for n, d in known.items()], name


def test_every_algorithm_is_in_the_api_reference():
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for name in optim.__all__:
        kind = getattr(optim, name)
        assert kind.__doc__ and kind.__doc__ != torch.optim.Optimizer.__doc__, name
        if not name.endswith("bit") and not name.startswith("Paged"):
            assert f"::: {kind.__module__}.{name}\n" in text, name


# ---- a model that changes under the optimizer ----


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_compensation_follows_the_parameters_dtype(backend):
    """bf16 bits of the compensation must not be read as fp16 after `model.half()`."""
    net = nn.Linear(64, 64).bfloat16()
    opt = optim.AdamW8bit(net.parameters(), lr=1e-3, kahan=True)
    opt.backend = backend
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
        net.to(dtype)
        kept = opt.state[net.weight]["compensation"].clone() if opt.state else None
        before = net.weight.detach().float()
        net.zero_grad()
        net(torch.ones(2, 64, dtype=dtype)).sum().backward()
        opt.step()
        state = opt.state[net.weight]
        assert state["compensation"].dtype == dtype
        if dtype != torch.float32:  # rounded value plus compensation is the value: it moves by lr, no more
            moved = net.weight.detach().float() + state["compensation"].float() - before
            moved -= 0 if kept is None else kept.float()
            assert moved.abs().max() < 2e-3


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_parameter_of_another_shape_is_an_error(backend):
    """Its states are too small: a kernel would write behind them."""
    p = nn.Parameter(torch.randn(80, 80))
    opt = optim.AdamW8bit([p])
    opt.backend = backend
    p.grad = torch.ones_like(p)
    opt.step()
    p.data, p.grad = torch.randn(160, 80), None
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"shape \(160, 80\) now, but its state 'exp_avg' \(80, 80\)"):
        opt.step()
    del opt.state[p]
    opt.step()
    assert opt.state[p]["exp_avg"].shape == (160, 80)


@pytest.mark.gpu
def test_a_model_that_moves_to_the_gpu_takes_its_states_along():
    net = nn.Linear(64, 64).bfloat16()
    opt = optim.AdamW8bit(net.parameters(), kahan=True)
    for device in ("cpu", "cuda", "cpu"):
        net.to(device)
        net.zero_grad()
        net(torch.ones(2, 64, dtype=torch.bfloat16, device=device)).sum().backward()
        opt.step()
        assert {value.device.type for value in opt.state[net.weight].values()} == {device}
    assert int(opt.state[net.weight]["step"]) == 3


def test_copies_keep_overrides_and_backend():
    net = nn.Linear(64, 64)
    opt = optim.AdamW8bit(net.parameters())
    opt.override(net, optim_bits=32)
    opt.backend = "torch"
    twin, there = copy.deepcopy((opt, net))
    there(torch.ones(2, 64)).sum().backward()
    twin.step()
    assert twin.backend == "torch" and twin.state[there.weight]["exp_avg"].dtype == torch.float32


def test_step_counts_of_numpy_and_parameters_listed_twice_load():
    p = matrix()
    with pytest.warns(UserWarning, match="duplicate"):
        opt = optim.AdamW([p, p])
    p.grad = torch.ones_like(p)
    opt.step()
    saved = opt.state_dict()
    saved["state"] = {key: {**state, "step": np.int64(3)} for key, state in saved["state"].items()}
    opt.load_state_dict(saved)
    assert opt.state[p]["step"].item() == 3
