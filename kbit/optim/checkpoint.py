"""Loading optimizer checkpoints, all or nothing: our own, and those of torch.optim and bitsandbytes (foreign.py).

A checkpoint's fp32 states stay fp32 until the first step, also where the settings ask for 8 bits: an `override` to 32
bits may follow, and a resumed run is exact. Errors name group, parameter and state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kbit.formats.blocks import dequantize_dynamic
from kbit.optim import foreign, sharding
from kbit.optim import state as states
from kbit.optim.rules import Rule, StateSpec

if TYPE_CHECKING:
    from kbit.optim.optimizer import KbitOptimizer

# What the constructor decides, and a checkpoint does not change.
STRUCTURE = ("optim_bits", "min_8bit_size", "is_paged", "stochastic_rounding", "kahan")


def load_groups(optimizer: KbitOptimizer, state_dict: Any) -> list[dict[str, Any]]:
    """New parameter groups: settings as saved, parameters and structure as constructed."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("not an optimizer state dict: it needs the keys 'state' and 'param_groups'")
    own, saved = optimizer.param_groups, state_dict["param_groups"]
    if not isinstance(saved, (list, tuple)) or not isinstance(state_dict["state"], Mapping):
        raise ValueError("not an optimizer state dict: 'state' must be a dict and 'param_groups' a list")
    if len(own) != len(saved):
        raise ValueError(f"loaded state dict has {len(saved)} parameter groups, this optimizer {len(own)}")
    return [_load_group(optimizer, *pair) for pair in enumerate(zip(own, saved, strict=True))]


def _load_group(optimizer: KbitOptimizer, number: int, pair: tuple[dict[str, Any], Any]) -> dict[str, Any]:
    group, other = pair
    if not isinstance(other, dict) or not isinstance(other.get("params"), (list, tuple)):
        raise ValueError(f"parameter group {number} of the loaded state dict has no 'params'")
    if len(group["params"]) != len(other["params"]):
        raise ValueError(
            f"parameter group {number}: loaded state dict has {len(other['params'])} parameters, this optimizer "
            f"{len(group['params'])}"
        )
    needed = set(group) & set(optimizer.defaults) - {*STRUCTURE, "params", "param_names", "initial_lr"}
    foreign.check_algorithm(type(optimizer).__name__, optimizer.algorithm, number, group, other, needed)
    if other.get("maximize") or other.get("amsgrad"):
        raise ValueError(f"parameter group {number}: maximize and amsgrad are not supported")
    dropped = (*STRUCTURE, *foreign.IGNORED, foreign.ALGORITHM_KEY, "params", "param_names")
    kept = foreign.settings_from_bnb(group, {k: v for k, v in other.items() if k not in dropped})
    kept = copy.deepcopy(kept)
    if isinstance(kept.get("lr"), Tensor) and isinstance(group["lr"], Tensor):
        kept["lr"] = kept["lr"].to(group["lr"].device)
    for key in ("maximize", "amsgrad"):
        if key not in group:
            kept.pop(key, None)
    try:
        optimizer._check({**group, **kept})
    except ValueError as error:
        raise ValueError(f"parameter group {number} of the loaded state dict: {error}") from None
    return {**group, **kept}


def load_state(
    optimizer: KbitOptimizer, state_dict: Mapping[str, Any], groups: list[dict[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """New states by parameter, in the containers that `_take` chooses."""
    places: dict[Any, tuple[Tensor, dict[str, Any], str]] = {}
    for number, (group, saved) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        names = group.get("param_names") or [None] * len(group["params"])
        for p, key, name in zip(group["params"], saved["params"], names, strict=True):
            if key in places and places[key][0] is not p:
                raise ValueError(f"parameter group {number} of the loaded state dict lists parameter {key!r} again")
            places[key] = (p, group, f"parameter {key!r}{f' ({name})' if name else ''} of group {number}")
    loaded: dict[Tensor, dict[str, Any]] = {}
    for key, values in state_dict["state"].items():
        if key not in places:
            raise ValueError(f"loaded state dict has a state for parameter {key!r}, which no group lists")
        p, group, where = places[key]
        if not isinstance(values, Mapping):
            raise ValueError(f"state of {where} is a {type(values).__name__}, not a dict of tensors")
        config = {**group, **optimizer._overrides.get(p, {})}
        if any(value is not None for value in values.values()):  # torch's SGD keeps a buffer of None
            loaded[p] = _load_one(values, p, config, optimizer._rule(config), where)
    return loaded


def _load_one(values: Mapping[str, Any], p: Tensor, config: dict[str, Any], rule: Rule, where: str) -> dict[str, Any]:
    if foreign.BNB_KEY in values or "state1" in values:
        values = foreign.state_from_bnb(values, p, rule, where)
    known = {"step", "compensation"} | {n for spec in rule.states for n in (spec.name, states.absmax_key(spec.name))}
    if others := sorted(str(k) for k, v in values.items() if k not in known and v is not None):
        wanted = ", ".join(spec.name for spec in rule.states) or "none"
        raise ValueError(
            f"state of {where} holds {', '.join(others)}, which this optimizer does not have (its states: "
            f"{wanted}): the checkpoint is another algorithm's, or has other settings"
        )
    fresh: dict[str, Any] = {"step": _step_count(values, p, where)}
    for spec in rule.states:
        if values.get(spec.name) is None:
            raise ValueError(f"state of {where} has no {spec.name!r}; it has {', '.join(sorted(values))}")
        _take(fresh, values, spec, p, config, where)
    if (kept := values.get("compensation")) is not None:
        _check_tensor(kept, p, "compensation", where)
        fresh["compensation"] = sharding.distribute(kept.detach(), p).to(device=p.device, dtype=p.dtype, copy=True)
    return fresh


def _step_count(values: Mapping[str, Any], p: Tensor, where: str) -> Tensor:
    if "step" not in values and values.get("momentum_buffer") is not None:
        return torch.ones((), device=p.device)  # torch's SGD and Muon count none; the buffer shows that there was one
    if "step" not in values:
        raise ValueError(f"state of {where} has no 'step'")
    step = values["step"]
    count = math.nan
    if isinstance(step, Real) or (isinstance(step, Tensor) and step.numel() == 1):
        count = float(sharding.local(step)) if isinstance(step, Tensor) else float(step)
    if not (count >= 0 and count.is_integer()):
        raise ValueError(f"state 'step' of {where} is {step!r}: it must be a whole number of steps, 0 or more")
    return torch.tensor(count, dtype=torch.float32, device=p.device)


def _take(
    fresh: dict[str, Any], values: Mapping[str, Any], spec: StateSpec, p: Tensor, config: dict[str, Any], where: str
) -> None:
    """Copy one state into `fresh`: codes as they are or, for 32 bits, decoded; anything else as fp32.

    What was saved in more bits than the settings ask for keeps them until the first step. Until then it stays on the
    device on which it was saved, so that a large fp32 checkpoint never has to fit beside the model.
    """
    stored = values[spec.name]
    _check_tensor(stored, p, spec.name, where)
    bits8, paged = states.wants_8bit(p.numel(), config), states.wants_paging(p, config)
    if stored.dtype != torch.uint8:
        # torch.distributed.checkpoint leaves scales of the fresh optimizer beside fp32 values, which is harmless.
        if values.get(states.absmax_key(spec.name)) is not None and states.are_whole(stored):
            raise ValueError(
                f"state {spec.name!r} of {where} holds 8-bit codes as {stored.dtype} numbers beside block scales, as a "
                "cast of every tensor of a checkpoint makes them; cast what is not uint8 only"
            )
        if not spec.signed and bool((sharding.local(stored) < 0).any()):
            raise ValueError(
                f"state {spec.name!r} of {where} holds negative values, but it is an average or a sum of squares: the "
                "checkpoint is another algorithm's, or damaged"
            )
        if states.are_numbers_of_codes(stored):
            raise ValueError(
                f"state {spec.name!r} of {where} holds 8-bit codes as {stored.dtype} numbers: the checkpoint was read "
                "into an optimizer with 32-bit states. Read it into one with the bits that it was saved with, or "
                "convert it first (torch.distributed.checkpoint.format_utils.dcp_to_torch_save)"
            )
        stored = sharding.distribute(stored, p)
        device = stored.device if bits8 and not sharding.is_sharded(p) else p.device
        fresh[spec.name] = stored.detach().to(device=device, dtype=torch.float32, copy=True).contiguous()
        if bits8 and not paged:
            return
        bits8 = False
    else:
        _take_codes(fresh, stored, values.get(states.absmax_key(spec.name)), spec, p, where)
    states.convert(fresh, spec, p, bits8, paged)


def _take_codes(fresh: dict[str, Any], codes: Tensor, absmax: Any, spec: StateSpec, p: Tensor, where: str) -> None:
    """Codes and absmax as they are, in shards where the parameter is sharded."""
    blocks, shape = -(-p.numel() // states.BLOCK_SIZE), states.absmax_shape(p.shape)
    if not isinstance(absmax, Tensor) or absmax.numel() != blocks or not absmax.is_floating_point():
        raise ValueError(f"state {spec.name!r} of {where} needs {blocks} block scales beside its codes")
    foreign.check_scales(sharding.local(absmax), states.absmax_key(spec.name), where)
    if sharding.is_sharded(p) and len(shape) == 1:
        # Blocks that run across ranks: take the values, and let blocks of this rank's own elements form.
        whole = codes.full_tensor() if sharding.is_sharded(codes) else codes  # type: ignore[attr-defined]
        decoded = dequantize_dynamic(
            whole.to(p.device), absmax.to(p.device), spec.signed, states.BLOCK_SIZE, torch.float32
        )
        fresh[spec.name] = sharding.distribute(decoded, p)
        return
    fresh[spec.name] = sharding.distribute(codes, p).detach().to(p.device, copy=True).contiguous()
    absmax = absmax.detach().to(device=p.device, dtype=torch.float32, copy=True)
    absmax = absmax if sharding.is_sharded(absmax) else sharding.distribute(absmax.reshape(shape), p)
    fresh[states.absmax_key(spec.name)] = absmax


def _check_tensor(stored: Any, p: Tensor, name: str, where: str) -> None:
    if not isinstance(stored, Tensor):
        raise ValueError(f"state {name!r} of {where} is a {type(stored).__name__}, not a tensor")
    if stored.shape != p.shape:
        raise ValueError(f"state {name!r} of {where} has shape {tuple(stored.shape)}, the parameter {tuple(p.shape)}")
    if not stored.is_floating_point() and (stored.dtype != torch.uint8 or name == "compensation"):
        raise ValueError(f"state {name!r} of {where} is {stored.dtype}, not floating-point or uint8 codes")


def reshardable(values: dict[str, Any], p: Tensor, rule: Rule) -> dict[str, Any]:
    """The states of a sharded parameter, with fp32 values where block scales belong to one rank's elements only."""
    out = dict(values)
    for spec in rule.states:
        absmax = out.get(states.absmax_key(spec.name))
        if absmax is not None and not sharding.is_sharded(absmax):
            decoded = states.read(out, spec, p.device)
            del out[states.absmax_key(spec.name)]
            out[spec.name] = sharding.wrap(decoded, p, p.shape)
    return out
