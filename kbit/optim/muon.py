"""Muon with 8-bit momentum: the update of a matrix is its momentum, made nearly orthogonal.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon); the learning-rate match to AdamW is Liu et al. 2025, "Muon is Scalable for LLM
Training" (arXiv 2502.16982). Settings and results are torch.optim.Muon's. Muon is for the weight matrices of hidden
layers; a group with `use_muon=False` (embeddings, heads, norms, biases) gets AdamW with `betas` and `adamw_eps`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kbit.optim import sharding, state
from kbit.optim.batch import Batch, Item
from kbit.optim.optimizer import KbitOptimizer
from kbit.optim.rules import DECOUPLED, MOMENTUM, NO_NORM, SGD, Rule, StateSpec, rule_for
from kbit.optim.settings import check_muon, parse_betas

_RULE = Rule(SGD, DECOUPLED, NO_NORM, MOMENTUM, (StateSpec("momentum_buffer", True),))


class Muon(KbitOptimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), as torch.optim.Muon: the update of a matrix is its
    momentum, made nearly orthogonal.

    momentum: decay of the average of gradients, in [0, 1). nesterov: mix the new gradient in once more.
    ns_coefficients, ns_steps, eps: of the Newton-Schulz iteration that makes it orthogonal.
    adjust_lr_fn: None or "original" scales the rate by sqrt(max(1, rows / columns)), "match_rms_adamw" by
        0.2 * sqrt(max(rows, columns)) (arXiv 2502.16982).
    weight_decay: decoupled, as in AdamW.
    betas, adamw_eps: of AdamW, in groups with the key `"use_muon": False`.
    optim_bits and other options: as in KbitOptimizer.

    States: `momentum_buffer` (signed) and `step`, half of Adam's; AdamW's in groups with `"use_muon": False`. Raises
    ValueError for a parameter that is no matrix in a group that uses Muon, and there for max_unorm, skip_zeros,
    stochastic_rounding and kahan. A matrix whose gradient is not finite is left alone.
    """

    algorithm = "muon"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": parse_betas(betas, 2),
            "adamw_eps": adamw_eps,
            "use_muon": True,
        }
        super().__init__(params, defaults, **options)

    def _check(self, config: Mapping[str, Any]) -> None:
        super()._check(config)
        check_muon(config)
        wrong = next((p for p in config.get("params", ()) if p.ndim != 2), None)
        if config["use_muon"] and wrong is not None:
            raise ValueError(
                f"Muon is for matrices, not for a parameter of shape {tuple(wrong.shape)}: put it into a group with "
                '"use_muon": False, which gets AdamW'
            )

    def _rule(self, config: dict[str, Any]) -> Rule:
        return _RULE if config["use_muon"] else rule_for("adamw", config)

    def _dispatch(self, batch: Batch, key: Any) -> None:
        if batch.config["use_muon"]:
            if any(sharding.is_sharded(item.owner) for item in batch.items):
                raise NotImplementedError("Muon needs whole matrices; sharded parameters are not supported")
            for item in batch.items:
                _step_matrix(batch, item)
            return
        config = {**batch.config, "eps": batch.config["adamw_eps"]}
        super()._dispatch(Batch("adamw", batch.rule, config, batch.bits8, batch.items), key)


def _step_matrix(batch: Batch, item: Item) -> None:
    config, spec = batch.config, _RULE.states[0]
    item.state["step"] += 1
    if item.p.numel() == 0:
        return
    p, g = item.p.float(), item.g.float()
    old = state.read(item.state, spec, p.device)
    momentum = torch.lerp(old, g, 1.0 - config["momentum"])
    update = torch.lerp(g, momentum, config["momentum"]) if config["nesterov"] else momentum
    update = orthogonalize(update, config["ns_coefficients"], config["ns_steps"], config["eps"]).float()
    rows, columns = p.shape
    ratio = math.sqrt(max(1.0, rows / columns))
    if config["adjust_lr_fn"] == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    lr = config["lr"]
    moved = p * (1.0 - lr * config["weight_decay"]) - update * (lr * ratio)
    finite = momentum.isfinite().all()  # stays on the device
    state.write(item.state, spec, torch.where(finite, momentum, old))
    moved = torch.where(finite, moved, p)
    (item.target if item.target is not None else item.p).copy_(moved)


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """bf16 `[M, N]` with the singular vectors of `matrix` and singular values near 1, by a quintic Newton-Schulz
    iteration: X <- a X + (b A + c A A) X with A = X X^T, on the side that is shorter."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16().T if tall else matrix.bfloat16()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon8bit(Muon):
    """Muon with 8-bit momentum: 1.02 bytes a parameter."""

    forced_bits = 8


class Muon32bit(Muon):
    """Muon with 32-bit momentum."""

    forced_bits = 32
