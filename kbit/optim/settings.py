"""What the settings of a parameter group may be, and who an override is for: errors that name what was wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

# Numbers from 0 up, as in torch.optim.
_NOT_NEGATIVE = ("eps", "adamw_eps", "weight_decay", "max_unorm", "momentum", "lr_decay", "initial_accumulator_value")
_FLAGS = (
    "skip_zeros",
    "stochastic_rounding",
    "kahan",
    "is_paged",
    "nesterov",
    "centered",
    "adam_w_mode",
    "bias_correction",
    "use_muon",
)
# Keys of a parameter group that are no settings: what schedulers write, and labels that training scripts read.
_LABELS: tuple[str, ...] = ("params", "param_names", "name", "group_name", "layer_id")
_LABELS += ("lr_scale", "lr_mult", "wd_mult", "moe")
_LABELS += ("initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "base_momentum", "max_momentum")
# Settings of torch.optim that ask for nothing where they are off.
_OFF = ("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable")
# Keywords of earlier bitsandbytes and of torch.optim -> what to do instead.
_ADVICE = {
    "percentile_clipping": "leave it out, and clip with torch.nn.utils.clip_grad_norm_",
    "block_wise": "leave it out: 8-bit states always have one scale for each block of 256 elements",
    "blocksize": "leave it out: 8-bit states always have one scale for each block of 256 elements",
    "block_size": "leave it out: 8-bit states always have one scale for each block of 256 elements",
    "fused": "leave it out: a step is always one launch for all tensors of a kind",
    "foreach": "leave it out: a step is always one launch for all tensors of a kind",
    "capturable": "leave it out: steps can be captured in a CUDA graph where lr is a tensor on the GPU",
    "amsgrad": "leave it out, or use torch.optim",
    "maximize": "negate the loss",
    "differentiable": "use torch.optim",
}


def refuse_keywords(name: str, unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """TypeError for constructor arguments that optimizer `name` lacks."""
    for keyword in sorted(unknown):
        if keyword not in _OFF or unknown[keyword]:
            advice = _ADVICE.get(keyword, f"its settings are {', '.join(sorted(known))}")
            raise TypeError(f"{name} has no argument {keyword!r}: {advice}")


def check_keys(name: str, algorithm: str, group: Mapping[str, Any], known: Iterable[str], free: bool) -> None:
    """TypeError for a key of a parameter group that is neither a setting of optimizer `name` nor a label.

    ValueError for amsgrad, as where it is an argument.
    free: take keys that nobody knows for labels; those with an advice are refused all the same.
    """
    known = set(known)
    for key in group:
        if key in known or key in _LABELS or str(key).startswith("_"):
            continue
        value = group[key]
        if (key in _OFF and not value) or (key == "decoupled_weight_decay" and value == (algorithm == "adamw")):
            continue  # a group of torch.optim, which asks for nothing else
        if key == "amsgrad":
            raise ValueError(f"{name} does not support amsgrad=True, which a parameter group holds")
        if free and key not in _ADVICE:
            continue
        advice = _ADVICE.get(key, f"its settings are {', '.join(sorted(known))}. For a label, use 'name' or '_{key}'")
        raise TypeError(f"{name} has no setting {key!r}, which a parameter group holds: {advice}")


def forced(name: str, given: Mapping[str, Any], bits: int | None, paging: bool | None) -> dict[str, Any]:
    """The settings that the name of an optimizer fixes. ValueError where an argument says otherwise.

    bitsandbytes' 8-bit classes take optim_bits=32, their default, and have 8 bits all the same: so do ours.
    """
    fixed: dict[str, Any] = {}
    if bits is not None:
        if given["optim_bits"] not in (bits, 32):
            raise ValueError(
                f"{name} has {bits}-bit states, and optim_bits={given['optim_bits']!r} asks for something else: leave "
                f"it out, or choose {name.removesuffix(f'{bits}bit')} with optim_bits=8 or 32"
            )
        fixed["optim_bits"] = bits
    if paging is not None:
        if not isinstance(given["is_paged"], bool):
            raise ValueError(f"invalid is_paged: {given['is_paged']!r} (must be True or False)")
        fixed["is_paged"] = paging
    return fixed


def check(config: Mapping[str, Any], algorithm: str) -> None:
    """Raise ValueError for a setting of a parameter group that is out of range or no number, naming it."""
    lr = config["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"invalid learning rate: a tensor of shape {tuple(lr.shape)} (must hold one element)")
        if lr.device.type != "meta":
            lr = float(lr)  # waits for a GPU, here and not in a step
    if not isinstance(lr, Tensor) and (isinstance(lr, bool) or not _is_number(lr) or not 0.0 <= lr < math.inf):
        raise ValueError(f"invalid learning rate: lr={lr!r} (must be a number, 0 or more)")
    for key in _NOT_NEGATIVE:
        if key in config and (not _is_number(config[key]) or not 0.0 <= config[key] < math.inf):
            raise ValueError(f"invalid {key}: {config[key]!r} (must be a number, 0 or more)")
    if "dampening" in config and not _is_number(config["dampening"]):
        raise ValueError(f"invalid dampening: {config['dampening']!r} (must be a number)")
    if "betas" in config:
        _check_betas(config["betas"], 3 if algorithm == "ademamix" else 2)
    if "alpha" in config:
        # RMSprop's is the decay of an average, AdEMAMix's the weight of one.
        limit, text = (math.inf, "0 or more") if algorithm == "ademamix" else (1.0, "in [0, 1)")
        if not _is_number(config["alpha"]) or not 0.0 <= config["alpha"] < limit:
            raise ValueError(f"invalid alpha: {config['alpha']!r} (must be {text})")
    for key in ("t_alpha", "t_beta3"):
        value = config.get(key)
        if value is not None and (not _is_number(value) or not 0 <= value < math.inf):
            raise ValueError(f"invalid {key}: {value!r} (must be a number of steps, or None for no warm-up)")
    for key in _FLAGS:
        if key in config and not isinstance(config[key], bool):
            raise ValueError(f"invalid {key}: {config[key]!r} (must be True or False)")
    if config.get("nesterov") and "dampening" in config and (config["momentum"] <= 0 or config["dampening"] != 0):
        raise ValueError("nesterov needs a momentum above 0 and no dampening")
    if config["optim_bits"] not in (8, 32):
        raise ValueError(f"optim_bits must be 8 or 32, not {config['optim_bits']!r}")
    size = config["min_8bit_size"]
    if not isinstance(size, Integral) or size < 0:
        raise ValueError(f"invalid min_8bit_size: {size!r} (must be a whole number of elements)")
    if config["stochastic_rounding"] and config["kahan"]:
        raise ValueError("stochastic_rounding and kahan exclude each other: choose one")
    if config["stochastic_rounding"] and any(p.dtype == torch.float16 for p in config["params"]):
        raise ValueError("stochastic_rounding is for bfloat16 parameters; use kahan=True for float16")


def check_muon(config: Mapping[str, Any]) -> None:
    """The same for what only Muon has, in a group that uses it."""
    if config["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        raise ValueError(f"adjust_lr_fn must be None, 'original' or 'match_rms_adamw', not {config['adjust_lr_fn']!r}")
    steps, coefficients = config["ns_steps"], config["ns_coefficients"]
    if not isinstance(steps, int) or not 0 <= steps < 100:
        raise ValueError(f"invalid ns_steps: {steps!r} (must be a whole number below 100)")
    if not isinstance(coefficients, tuple | list) or len(coefficients) != 3 or not all(map(_is_number, coefficients)):
        raise ValueError(f"invalid ns_coefficients: {coefficients!r} (must be three numbers)")
    if not config["use_muon"]:
        return
    if config["momentum"] >= 1.0:
        raise ValueError(f"invalid momentum: {config['momentum']!r} (must be in [0, 1): it is the decay of an average)")
    for key in ("kahan", "stochastic_rounding", "skip_zeros", "max_unorm"):
        if config[key]:
            raise ValueError(
                f"{key}={config[key]!r} is not for Muon, whose update is a whole matrix: leave it out, or set it in "
                'the groups with "use_muon": False, which get AdamW'
            )


def parse_betas(betas: Any, count: int) -> tuple[float, ...]:
    """Betas as numbers; a string such as "(0.9, 0.999)" comes from command lines."""
    values = betas
    if isinstance(betas, str):
        try:
            values = tuple(float(beta) for beta in betas.strip("()[] ").split(","))
        except ValueError:
            raise ValueError(f"invalid betas: {betas!r} (must be {count} numbers, such as (0.9, 0.999))") from None
    elif isinstance(betas, Iterable) and not isinstance(betas, (list, tuple)):
        values = tuple(betas)
    _check_betas(values, count)
    return tuple(float(beta) for beta in values)


def override_targets(target: Any, groups: Mapping[Tensor, Mapping[str, Any]], optimizer: str) -> list[Tensor]:
    """The parameters that an override is for. groups: the group of each parameter of the optimizer.

    Raises TypeError for what is no parameter, module or list of parameters, ValueError for what the optimizer lacks.
    """
    names: dict[Tensor, str] = {}
    if isinstance(target, nn.Module):
        names = {p: name for name, p in target.named_parameters() if p.requires_grad}
        chosen = list(names)
    elif isinstance(target, Tensor):
        chosen = [target]
    elif isinstance(target, str) or not isinstance(target, Iterable):
        raise TypeError(
            f"override takes a parameter, a module or a list of parameters, not {target!r} ({type(target).__name__}); "
            "a name is looked up with model.get_parameter(name) or model.get_submodule(name)"
        )
    else:
        chosen = list(target)
    for entry in chosen:
        if not isinstance(entry, Tensor):
            raise TypeError(f"override takes a list of parameters, but it holds {entry!r} ({type(entry).__name__})")
        if entry not in groups:
            name = f" ({names[entry]!r} of the module)" if entry in names else ""
            raise ValueError(
                f"a parameter of shape {tuple(entry.shape)}{name} does not belong to this {optimizer}: it optimizes "
                f"{len(groups)} parameters that it was constructed with or that add_param_group added"
            )
    if not chosen:
        empty = "an empty list"
        if isinstance(target, nn.Module):
            empty = f"{type(target).__name__} has none that requires a gradient"
        raise ValueError(f"override was given no parameter: {empty}")
    return chosen


def _check_betas(betas: Any, count: int) -> None:
    if isinstance(betas, str) or not isinstance(betas, Iterable):
        raise ValueError(f"invalid betas: {betas!r} (must be {count} numbers, such as (0.9, 0.999))")
    values = tuple(betas)
    if len(values) != count:
        raise ValueError(f"betas must have {count} values, not {len(values)}: {betas!r}")
    for index, beta in enumerate(values):
        if not _is_number(beta) or not 0.0 <= beta < 1.0:
            raise ValueError(f"invalid beta parameter at index {index}: {beta!r} (must be in [0, 1))")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
