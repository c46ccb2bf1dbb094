"""The mathematics of every algorithm, once, in plain fp32: the oracle of the CPU and GPU kernels.

A rule turns a gradient and its old states into new states and a *direction*; one line in `apply` then moves the
parameter, the same for all algorithms:

    p = p * shrink - (rate * scale) * direction

`shrink = 1 - lr * weight_decay` for decoupled decay (before the update, as torch does it), else 1. `scale` is 1 unless
the algorithm normalises by norms (LAMB, LARS) or `max_unorm` caps the update. Everything that depends only on the step
count and the hyperparameters is a scalar of `Scalars`, computed in float64 and rounded to fp32 once.

Every operation is rounded by itself, except where torch.optim multiplies and adds at once (`add` with `alpha`, a fused
multiply-add on every device): there the product is not rounded. Kernels that do the same give the same bits.

Sources: Adam (Kingma & Ba 2014, arXiv 1412.6980); AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101); Lion (Chen et
al. 2023, arXiv 2302.06675); LAMB (You et al. 2019, arXiv 1904.00962); LARS (You et al. 2017, arXiv 1708.03888);
AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137); RMSprop, Adagrad and SGD as in torch.optim.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Numbers that kernels know the algorithms, decays and norms by.
ADAM, ADEMAMIX, LION, SGD, RMSPROP, ADAGRAD = range(6)
NO_DECAY, COUPLED, DECOUPLED, IN_DIRECTION = range(4)
NO_NORM, CAP, LAMB_TRUST, LARS_TRUST = range(4)
NESTEROV, MOMENTUM, CENTERED = 1, 2, 4


class Scalars(NamedTuple):
    """What a kernel reads, in this order, as fp32."""

    rate: float = 0.0  # step size along the direction
    shrink: float = 1.0  # factor of the parameter, decoupled decay
    l2: float = 0.0  # decay added to the gradient
    dir_decay: float = 0.0  # decay added to the direction (LAMB)
    b1: float = 0.0
    c1: float = 1.0  # weight of the new gradient in the first state
    b2: float = 0.0
    c2: float = 1.0
    b3: float = 0.0
    c3: float = 1.0
    inv_bias1: float = 1.0  # 1 / (1 - b1^t)
    inv_sqrt_bias2: float = 1.0  # 1 / sqrt(1 - b2^t)
    eps: float = 0.0
    alpha: float = 0.0
    max_unorm: float = 0.0
    step: float = 0.0  # for the random bits of stochastic rounding


@dataclass(frozen=True)
class StateSpec:
    """One state tensor of an algorithm: the name torch gives it, and whether its values have a sign."""

    name: str
    signed: bool


EXP_AVG, EXP_AVG_SQ = StateSpec("exp_avg", True), StateSpec("exp_avg_sq", False)
SQUARE_AVG, GRAD_AVG = StateSpec("square_avg", False), StateSpec("grad_avg", True)


@dataclass(frozen=True)
class Rule:
    """An algorithm: its number, the kind of decay and norm it uses, its flags and its states in kernel order."""

    algorithm: int
    decay: int
    norm: int
    flags: int
    states: tuple[StateSpec, ...]


def rule_for(name: str, config: Mapping[str, Any]) -> Rule:
    """The rule of a named algorithm under a group's settings. Raises ValueError for an unknown name."""
    norm = CAP if config.get("max_unorm", 0.0) else NO_NORM
    if name == "adam":
        return Rule(ADAM, COUPLED, norm, 0, (EXP_AVG, EXP_AVG_SQ))
    if name == "adamw":
        return Rule(ADAM, DECOUPLED, norm, 0, (EXP_AVG, EXP_AVG_SQ))
    if name == "lamb":
        decay = IN_DIRECTION if config["adam_w_mode"] else COUPLED
        return Rule(ADAM, decay, LAMB_TRUST, 0, (EXP_AVG, EXP_AVG_SQ))
    if name == "ademamix":
        slow = StateSpec("exp_avg_slow", True)
        return Rule(ADEMAMIX, DECOUPLED, norm, 0, (EXP_AVG, slow, EXP_AVG_SQ))
    if name == "lion":
        return Rule(LION, DECOUPLED, norm, 0, (EXP_AVG,))
    if name in ("sgd", "lars"):
        has_buffer = config["momentum"] != 0
        flags = (MOMENTUM if has_buffer else 0) | (NESTEROV if config["nesterov"] else 0)
        if name == "lars":
            norm = LARS_TRUST if config.get("max_unorm", 0.0) else NO_NORM
        buffers = (StateSpec("momentum_buffer", True),) if has_buffer else ()
        return Rule(SGD, COUPLED, norm, flags, buffers)
    if name == "rmsprop":
        flags = (MOMENTUM if config["momentum"] > 0 else 0) | (CENTERED if config["centered"] else 0)
        states: tuple[StateSpec, ...] = (SQUARE_AVG,)
        if flags & MOMENTUM:
            states += (StateSpec("momentum_buffer", True),)
        if flags & CENTERED:
            states += (GRAD_AVG,)
        return Rule(RMSPROP, COUPLED, norm, flags, states)
    if name == "adagrad":
        return Rule(ADAGRAD, COUPLED, norm, 0, (StateSpec("sum", False),))
    raise ValueError(f"unknown algorithm {name!r}")


def scalars(name: str, rule: Rule, config: Mapping[str, Any], lr: float, step: int) -> Scalars:
    """Everything that depends only on settings, learning rate and step count (1 at the first step)."""
    decay = float(config.get("weight_decay", 0.0))
    values: dict[str, float] = {"rate": lr, "max_unorm": float(config.get("max_unorm", 0.0))}
    if rule.decay == COUPLED:
        values["l2"] = decay
    elif rule.decay == DECOUPLED:
        values["shrink"] = 1.0 - lr * decay
    elif rule.decay == IN_DIRECTION:
        values["dir_decay"] = decay
    if "eps" in config:
        values["eps"] = float(config["eps"])
    if rule.algorithm in (ADAM, ADEMAMIX, LION):
        betas = config["betas"]
        values |= {"b1": betas[0], "c1": 1.0 - betas[0], "b2": betas[1], "c2": 1.0 - betas[1]}
        if rule.algorithm != LION and config.get("bias_correction", True):
            values["inv_bias1"] = 1.0 / (1.0 - betas[0] ** step)
            values["inv_sqrt_bias2"] = 1.0 / math.sqrt(1.0 - betas[1] ** step)
        if rule.algorithm == ADEMAMIX:
            alpha, slow = ademamix_schedule(config, step)
            values |= {"alpha": alpha, "b3": slow, "c3": 1.0 - slow}
    elif rule.algorithm == SGD:
        # The first buffer is the gradient itself, undamped, as in torch.
        first = step == 1
        values["b1"] = 0.0 if first else float(config["momentum"])
        values["c1"] = 1.0 if first else 1.0 - float(config["dampening"])
        values["b2"] = float(config["momentum"])
    elif rule.algorithm == RMSPROP:
        values |= {"b1": float(config["alpha"]), "c1": 1.0 - float(config["alpha"]), "b2": float(config["momentum"])}
    elif rule.algorithm == ADAGRAD:
        values["rate"] = lr / (1.0 + (step - 1) * float(config["lr_decay"]))
    # Rounded here, so that whoever computes with them, in any precision, starts from the same numbers.
    return Scalars(**{key: ctypes.c_float(value).value for key, value in values.items()})


def ademamix_schedule(config: Mapping[str, Any], step: int) -> tuple[float, float]:
    """alpha and beta3 at a step: linear warm-up of alpha, and of beta3's half-life (AdEMAMix, section 3.1)."""
    beta1, beta3, alpha = config["betas"][0], config["betas"][2], float(config["alpha"])
    if config.get("t_alpha"):
        alpha = min(step * alpha / config["t_alpha"], alpha)
    if config.get("t_beta3") and step < config["t_beta3"] and beta1 > 0.0 and beta3 > 0.0:
        part = step / config["t_beta3"]
        log1, log3 = math.log(beta1), math.log(beta3)
        beta3 = min(math.exp(log1 * log3 / ((1.0 - part) * log3 + part * log1)), beta3)
    return alpha, beta3


def advance(rule: Rule, p: Tensor, g: Tensor, old: Sequence[Tensor], h: Scalars) -> tuple[list[Tensor], Tensor]:
    """New states and the direction of the update.

    p, g: fp32, one shape. old: fp32 states in the rule's order. Nothing is written in place.
    """
    if rule.decay == COUPLED:
        g = torch.add(g, p, alpha=h.l2)
    new: list[Tensor]
    if rule.algorithm == ADAM:
        m = old[0] * h.b1 + g * h.c1
        v = old[1] * h.b2 + g * g * h.c2
        new, direction = [m, v], m * h.inv_bias1 / (sqrt(v) * h.inv_sqrt_bias2 + h.eps)
    elif rule.algorithm == ADEMAMIX:
        m = old[0] * h.b1 + g * h.c1
        slow = old[1] * h.b3 + g * h.c3
        v = old[2] * h.b2 + g * g * h.c2
        direction = (m * h.inv_bias1 + slow * h.alpha) / (sqrt(v) * h.inv_sqrt_bias2 + h.eps)
        new = [m, slow, v]
    elif rule.algorithm == LION:
        direction = (old[0] * h.b1 + g * h.c1).sign()
        new = [old[0] * h.b2 + g * h.c2]
    elif rule.algorithm == SGD:
        if rule.flags & MOMENTUM:
            buffer = torch.add(old[0] * h.b1, g, alpha=h.c1)
            new, direction = [buffer], torch.add(g, buffer, alpha=h.b2) if rule.flags & NESTEROV else buffer
        else:
            new, direction = [], g
    elif rule.algorithm == RMSPROP:
        square = old[0] * h.b1 + g * g * h.c1
        new, spread = [square], square
        average = None
        if rule.flags & CENTERED:
            average = old[-1] * h.b1 + g * h.c1
            # Rounding may put the variance a little below zero. (States of 8 bits would far too often: never here.)
            spread = (square - average * average).clamp(min=0.0)
        direction = g / (sqrt(spread) + h.eps)
        if rule.flags & MOMENTUM:
            direction = old[1] * h.b2 + direction
            new.append(direction)
        if average is not None:
            new.append(average)
    else:
        total = old[0] + g * g
        new, direction = [total], g / (sqrt(total) + h.eps)
    if rule.decay == IN_DIRECTION:
        direction = direction + p * h.dir_decay
    return new, direction


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square root: torch's own on CPU is off by one bit in a fifth of all cases."""
    return x.double().sqrt().to(x.dtype)


def norm(x: Tensor) -> float:
    """Euclidean norm, summed in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) if x.numel() else 0.0


def trust_scale(kind: int, parameter_norm: float, other_norm: float, h: Scalars) -> float:
    """The factor by which norms scale an update (CAP, LAMB) or a gradient (LARS).

    CAP: at most 1, so that |update| <= max_unorm * |p|. LAMB: |p| / |update|, also capped by max_unorm where that is
    set. LARS: max_unorm * |p| / (|g| + decay * |p|), max_unorm being the paper's trust coefficient. A zero norm gives
    1: a parameter at zero can leave it.
    """
    if kind == NO_NORM or parameter_norm == 0.0 or other_norm == 0.0:
        return 1.0
    if kind == LARS_TRUST:
        return h.max_unorm * parameter_norm / (other_norm + h.l2 * parameter_norm)
    ratio = parameter_norm / other_norm
    if kind == CAP:
        return min(1.0, h.max_unorm * ratio)
    return min(ratio, h.max_unorm * ratio) if h.max_unorm > 0.0 else ratio


def apply(p: Tensor, direction: Tensor, h: Scalars, scale: float = 1.0) -> Tensor:
    """The moved parameter: shrink first, then the step (torch's order of decoupled decay)."""
    rate = torch.tensor(h.rate, dtype=torch.float32) * torch.tensor(scale, dtype=torch.float32)
    return torch.add(p * h.shrink, direction, alpha=-float(rate))
