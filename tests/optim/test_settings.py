"""Keys of parameter groups, arguments that a class's name fixes, and ranges of learning rates and momenta."""

from __future__ import annotations

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
        {"name": "decay", "lr_scale": 0.5, "layer_id": 3, "_mine": object()},
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
