"""Reading optimizer checkpoints: our own, torch.optim's and bitsandbytes'.

bitsandbytes keeps `state1`, `state2` (fp32, or codes with `qmap*` and `absmax*`) below the key
`__bnb_optimizer_quant_state__` of each parameter, older versions directly in the parameter's state; AdEMAMix stacks two
states in `state1`. Codes are taken over bit for bit where map, sign and block size are ours, else re-quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kbit.formats.blocks import dequantize_dynamic
from kbit.formats.codebooks import codebook
from kbit.optim import sharding
from kbit.optim import state as states
from kbit.optim.rules import Rule, StateSpec

if TYPE_CHECKING:
    from kbit.optim.optimizer import KbitOptimizer

BNB_KEY = "__bnb_optimizer_quant_state__"
# Settings of torch.optim and bitsandbytes that choose an implementation, not a result.
_IGNORED = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")


def load_groups(
    optimizer: KbitOptimizer, state_dict: dict[str, Any], structure: tuple[str, ...]
) -> list[dict[str, Any]]:
    """New parameter groups: settings as saved, parameters and structure as constructed."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("not an optimizer state dict: it needs the keys 'state' and 'param_groups'")
    own, saved = optimizer.param_groups, state_dict["param_groups"]
    if len(own) != len(saved):
        raise ValueError(f"loaded state dict has {len(saved)} parameter groups, this optimizer {len(own)}")
    groups = []
    for number, (group, other) in enumerate(zip(own, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"parameter group {number}: loaded state dict has {len(other['params'])} parameters, this optimizer "
                f"{len(group['params'])}"
            )
        if other.get("maximize") or other.get("amsgrad"):
            raise ValueError(f"parameter group {number}: maximize and amsgrad are not supported")
        kept = {k: v for k, v in other.items() if k not in (*structure, *_IGNORED, "params", "param_names")}
        kept = _settings_from_bnb(group, kept)
        for key in ("maximize", "amsgrad"):
            if key not in group:
                kept.pop(key, None)
        groups.append({**group, **kept})
    return groups


def _settings_from_bnb(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes files momentum, dampening and RMSprop's alpha under `betas`."""
    if "betas" in own or "betas" not in saved:
        return saved
    saved = dict(saved)
    first, second = saved.pop("betas")[:2]
    for key in ("alpha", "t_alpha", "t_beta3"):
        saved.pop(key, None)
    if "nesterov" in own:
        saved |= {"momentum": first, "dampening": second}
    elif "centered" in own:
        saved |= {"alpha": first}
    return {k: v for k, v in saved.items() if k in own or k != "eps"}


def load_state(
    optimizer: KbitOptimizer, state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """New states by parameter, each in the container that the optimizer asks for."""
    places: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for p, key in zip(group["params"], saved["params"], strict=True):
            places[key] = (p, group)
    loaded: dict[Tensor, dict[str, Any]] = {}
    for key, values in state_dict["state"].items():
        if key not in places:
            raise ValueError(f"loaded state dict has a state for parameter {key!r}, which no group lists")
        p, group = places[key]
        config = {**group, **optimizer._overrides.get(p, {})}
        if values:
            loaded[p] = _load_one(values, p, config, optimizer._rule(config), key)
    return loaded


def _load_one(values: dict[str, Any], p: Tensor, config: dict[str, Any], rule: Rule, key: Any) -> dict[str, Any]:
    if BNB_KEY in values or "state1" in values:
        values = _from_bnb(values, p, rule, key)
    if "step" not in values:
        raise ValueError(f"state of parameter {key!r} has no 'step'")
    step = values["step"]
    fresh: dict[str, Any] = {
        "step": torch.as_tensor(float(step), dtype=torch.float32).to(p.device)
        if not isinstance(step, Tensor)
        else step.detach().to(device=p.device, dtype=torch.float32, copy=True)
    }
    bits8, paged = states.wants_8bit(p.numel(), config), states.wants_paging(p, config)
    for spec in rule.states:
        if spec.name not in values or values[spec.name] is None:
            raise ValueError(f"state of parameter {key!r} has no {spec.name!r}; it has {sorted(values)}")
        _take(fresh, values, spec, p, key)
        states.convert(fresh, spec, p, bits8, paged)
    if isinstance(values.get("compensation"), Tensor):
        fresh["compensation"] = values["compensation"].detach().to(device=p.device, dtype=p.dtype, copy=True)
    return fresh


def _take(fresh: dict[str, Any], values: dict[str, Any], spec: StateSpec, p: Tensor, key: Any) -> None:
    """Copy one state: codes and absmax as they are, anything else as fp32."""
    stored = values[spec.name]
    if stored.shape != p.shape:
        raise ValueError(
            f"state {spec.name!r} of parameter {key!r} has shape {tuple(stored.shape)}, the parameter {tuple(p.shape)}"
        )
    stored = sharding.distribute(stored, p)
    if stored.dtype != torch.uint8:
        fresh[spec.name] = stored.detach().to(device=p.device, dtype=torch.float32, copy=True).contiguous()
        return
    absmax = values.get(states.absmax_key(spec.name))
    blocks = -(-p.numel() // states.BLOCK_SIZE)
    shape = states.absmax_shape(p.shape)
    if sharding.is_sharded(p) and len(shape) == 1 and absmax is not None and absmax.numel() == blocks:
        # Blocks that run across ranks: take the values, and let blocks of this rank's own elements form.
        whole = values[spec.name].full_tensor() if sharding.is_sharded(values[spec.name]) else values[spec.name]
        decoded = dequantize_dynamic(
            whole.to(p.device), absmax.to(p.device), spec.signed, states.BLOCK_SIZE, torch.float32
        )
        fresh[spec.name] = sharding.distribute(decoded, p)
        return
    if absmax is None or absmax.numel() != blocks:
        raise ValueError(f"state {spec.name!r} of parameter {key!r} needs {blocks} block scales beside its codes")
    fresh[spec.name] = stored.detach().to(p.device, copy=True).contiguous()
    absmax = absmax.detach().to(device=p.device, dtype=torch.float32, copy=True)
    absmax = absmax if sharding.is_sharded(absmax) else sharding.distribute(absmax.reshape(shape), p)
    fresh[states.absmax_key(spec.name)] = absmax


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


def _from_bnb(values: dict[str, Any], p: Tensor, rule: Rule, key: Any) -> dict[str, Any]:
    """bitsandbytes' state of one parameter under our names."""
    values = {**values, **values.get(BNB_KEY, {})}
    out: dict[str, Any] = {"step": values.get("step", 0)}
    sources: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for number in (1, 2):
        stored = values.get(f"state{number}")
        if stored is None:
            continue
        absmax, qmap = values.get(f"absmax{number}"), values.get(f"qmap{number}")
        if stored.dim() == p.dim() + 1 and stored.shape[1:] == p.shape:
            scales = absmax if absmax is not None else [None] * len(stored)
            sources += [(part, scale, qmap) for part, scale in zip(stored, scales, strict=True)]
        else:
            sources.append((stored, absmax, qmap))
    if len(sources) != len(rule.states):
        wanted = [spec.name for spec in rule.states]
        raise ValueError(f"bitsandbytes state of parameter {key!r} holds {len(sources)} tensors, not {wanted}")
    for spec, (stored, absmax, qmap) in zip(rule.states, sources, strict=True):
        if stored.numel() != p.numel():
            raise ValueError(f"bitsandbytes state of parameter {key!r} has {stored.numel()} elements, not {p.numel()}")
        stored = stored.reshape(p.shape)
        if stored.dtype != torch.uint8:
            out[spec.name] = stored
        elif absmax is None or qmap is None:
            raise ValueError(
                f"bitsandbytes state of parameter {key!r} is not block-wise (an old layout); load it with bitsandbytes "
                "and save fp32 states"
            )
        elif _is_ours(stored, absmax, qmap, spec):
            out[spec.name], out[states.absmax_key(spec.name)] = stored, absmax
        else:
            out[spec.name] = _decode(stored, absmax, qmap)
    return out


def _is_ours(codes: Tensor, absmax: Tensor, qmap: Tensor, spec: StateSpec) -> bool:
    own = codebook(states.codebook_name(spec.signed), qmap.device)
    return torch.equal(qmap.float(), own) and absmax.numel() == -(-codes.numel() // states.BLOCK_SIZE)


def _decode(codes: Tensor, absmax: Tensor, qmap: Tensor) -> Tensor:
    """fp32 values of codes under any 256-entry map, in blocks of 256 or, in old checkpoints, 2048."""
    block = next((b for b in (256, 2048) if absmax.numel() == -(-codes.numel() // b)), None)
    if block is None:
        raise ValueError(f"{absmax.numel()} block scales for {codes.numel()} codes fit no known block size")
    values = qmap.float()[codes.reshape(-1).long()]
    return (values * absmax.float().repeat_interleave(block)[: values.numel()]).view(codes.shape)
