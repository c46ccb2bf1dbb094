"""Whether parameters, gradients and states fit each other, before their addresses go to a kernel.

Other code may resize a parameter (`model.resize_token_embeddings` does, keeping the Parameter), put its own tensors
into `optimizer.state`, or cast them. What keeps all values is done here: dtype, memory layout, device. The rest is a
RuntimeError that says which parameter, both shapes, and what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kbit.optim import sharding
from kbit.optim import state as states
from kbit.optim.rules import Rule

Where = Callable[[], str]


def check_gradient(name: str, p: Tensor, grad: Tensor, where: Where) -> None:
    """Raise RuntimeError for a parameter or a gradient that no step of optimizer `name` can read."""
    if p.is_meta:
        raise RuntimeError(
            f"{where()} is on the meta device and has no values: load the model, or model.to_empty(device=...) and "
            "initialize it, before the step"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{name} does not support sparse gradients ({where()}, of shape {tuple(p.shape)}); build the embedding "
            "with sparse=False"
        )
    if grad.shape != p.shape or grad.device != p.device or sharding.local(grad).shape != sharding.local(p).shape:
        raise RuntimeError(
            f"{where()} has shape {tuple(p.shape)} on {p.device}, but its gradient {tuple(grad.shape)} on "
            f"{grad.device}: set it to None (optimizer.zero_grad()) after the parameter was resized or moved, and run "
            "the backward pass again"
        )


def fit(state: dict[str, Any], rule: Rule, p: Tensor, kahan: bool, where: Where) -> None:
    """Make states fit the parameter where that keeps their values; RuntimeError otherwise. kahan: as its group says."""
    part = sharding.local(p)
    for spec in rule.states:
        key = states.absmax_key(spec.name)
        if spec.name not in state:
            state.pop(key, None)
            continue
        _check(state[spec.name], spec.name, p, part, where)
        stored, absmax = state[spec.name], state.get(key)
        if stored.dtype == torch.uint8:
            blocks = -(-part.numel() // states.BLOCK_SIZE)
            found = sharding.local(absmax) if isinstance(absmax, Tensor) else None
            if found is None or found.numel() != blocks or not found.is_floating_point():
                shape = "none" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
                raise RuntimeError(
                    f"state {spec.name!r} of {where()} needs {blocks} fp32 block scales {key!r} beside its codes, but "
                    f"has {shape}. {_REMEDY}"
                )
            assert absmax is not None
            if (absmax.dtype, absmax.device) != (torch.float32, p.device) or not found.is_contiguous():
                state[key] = absmax.to(p.device, torch.float32).contiguous()
        elif absmax is not None:
            raise RuntimeError(
                f"state {spec.name!r} of {where()} is {stored.dtype} beside block scales {key!r}: 8-bit codes were "
                f"cast to numbers. {_REMEDY}"
            )
        if stored.dtype not in (torch.uint8, torch.float32) or not sharding.local(stored).is_contiguous():
            dtype = torch.uint8 if stored.dtype == torch.uint8 else torch.float32
            state[spec.name] = stored.to(dtype).contiguous()
    _fit_step(state, p, where)
    if not kahan:
        state.pop("compensation", None)  # of a checkpoint with kahan, or of steps with it
    elif "compensation" in state:
        _check(state["compensation"], "compensation", p, part, where)
        if state["compensation"].dtype == torch.uint8:
            raise RuntimeError(f"state 'compensation' of {where()} is uint8, not {p.dtype}. {_REMEDY}")
        if not sharding.local(state["compensation"]).is_contiguous():
            state["compensation"] = state["compensation"].contiguous()


_REMEDY = "Build a new optimizer, or `del optimizer.state[parameter]`, which starts this parameter's states anew"


def _check(stored: Any, name: str, p: Tensor, part: Tensor, where: Where) -> None:
    if not isinstance(stored, Tensor) or not (stored.is_floating_point() or stored.dtype == torch.uint8):
        kind = stored.dtype if isinstance(stored, Tensor) else type(stored).__name__
        raise RuntimeError(f"state {name!r} of {where()} is {kind}, not floating-point or uint8 codes. {_REMEDY}")
    if stored.shape != p.shape:
        raise RuntimeError(
            f"{where()} has shape {tuple(p.shape)} now, but its state {name!r} {tuple(stored.shape)}: it was resized "
            f"after its first step (as model.resize_token_embeddings does), or its state was replaced. {_REMEDY}"
        )
    local = sharding.local(stored)
    if sharding.is_sharded(stored) != sharding.is_sharded(p) or local.shape != part.shape:
        raise RuntimeError(f"state {name!r} of {where()} is not sharded as the parameter is. {_REMEDY}")
    if local.numel() and not local.data_ptr():
        raise RuntimeError(f"state {name!r} of {where()} has no memory (on {local.device}). {_REMEDY}")


def _fit_step(state: dict[str, Any], p: Tensor, where: Where) -> None:
    step = state["step"]
    if isinstance(step, Real):
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=p.device)
    elif not isinstance(step, Tensor) or step.numel() != 1 or step.is_meta:
        raise RuntimeError(f"state 'step' of {where()} is {step!r}, not one number. {_REMEDY}")


def make_finite(state: dict[str, Any], rule: Rule, where: Where) -> None:
    """Reset elements of 32-bit states that are NaN or infinite, which become codes next; one warning. Waits for a GPU.

    As codes they would spoil their block of 256 for good. All states of such an element start from 0: momentum without
    its second moment would be a step many times too large.
    """
    parts = [sharding.local(state[spec.name]) for spec in rule.states if spec.name in state]
    parts = [part for part in parts if part.dtype != torch.uint8]
    bad = torch.zeros((), dtype=torch.bool)
    for part in parts:
        bad = ~part.isfinite() | bad.to(part.device)
    if count := int(bad.sum()):
        warnings.warn(
            f"{where()}: {count} of {bad.numel()} elements have 32-bit states that are NaN or infinite, which 8-bit "
            "states cannot hold; the states of these elements start from 0",
            stacklevel=2,
        )
        for part in parts:
            part.masked_fill_(bad.to(part.device), 0.0)
