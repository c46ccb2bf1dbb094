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
#: A key of saved groups (of no live one): the algorithm whose states these are.
ALGORITHM_KEY = "algorithm"
# Settings that checkpoints of the same algorithm from elsewhere may lack.
_OPTIONAL = frozenset({"max_unorm", "skip_zeros", "use_muon", "betas", "adamw_eps"})
# Settings of torch.optim that tell its algorithms apart.
_HYPERPARAMETERS = frozenset(
    {"betas", "momentum", "dampening", "nesterov", "alpha", "centered", "lr_decay", "ns_steps"}
)
_HYPERPARAMETERS |= {"eps", "momentum_decay", "rho", "lambd", "t0", "etas", "step_sizes"}
# Algorithms that torch.optim has too, whose checkpoints name none.
_OF_TORCH = frozenset({"adam", "adamw", "sgd", "rmsprop", "adagrad", "muon"})


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
        if not isinstance(other, dict) or "params" not in other:
            raise ValueError(f"parameter group {number} of the loaded state dict has no 'params'")
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"parameter group {number}: loaded state dict has {len(other['params'])} parameters, this optimizer "
                f"{len(group['params'])}"
            )
        _check_algorithm(optimizer, number, group, other, structure)
        if other.get("maximize") or other.get("amsgrad"):
            raise ValueError(f"parameter group {number}: maximize and amsgrad are not supported")
        kept = {
            k: v for k, v in other.items() if k not in (*structure, *_IGNORED, ALGORITHM_KEY, "params", "param_names")
        }
        kept = _settings_from_bnb(group, kept)
        for key in ("maximize", "amsgrad"):
            if key not in group:
                kept.pop(key, None)
        try:
            optimizer._check({**group, **kept})
        except ValueError as error:
            raise ValueError(f"parameter group {number} of the loaded state dict: {error}") from None
        groups.append({**group, **kept})
    return groups


def _check_algorithm(
    optimizer: KbitOptimizer, number: int, own: dict[str, Any], saved: dict[str, Any], structure: tuple[str, ...]
) -> None:
    """Raise ValueError for a group that another algorithm has saved.

    Our groups say whose they are. Others tell by their settings: those of torch.optim have all that the algorithm
    needs; those of bitsandbytes are alike for all (`betas` hold whatever there is), and the states have to tell.
    """
    name, kind = type(optimizer).__name__, optimizer.algorithm
    source = saved.get(ALGORITHM_KEY)
    if source is not None and not isinstance(source, str):
        raise ValueError(f"parameter group {number}: {ALGORITHM_KEY} must be a name, got {source!r}")
    if source is None and "decoupled_weight_decay" in saved and kind in ("adam", "adamw"):
        source = "adamw" if saved["decoupled_weight_decay"] else "adam"
    if source is not None:
        same = source == kind or ({source, kind} == {"adam", "adamw"} and not saved.get("weight_decay"))
        if not same:
            raise ValueError(
                f"parameter group {number}: the loaded state dict is of {source}, but {name} is {kind}, whose states "
                f"mean something else. Load it into an optimizer of {source}, or start {name} without it."
            )
    if ALGORITHM_KEY in saved:
        return
    of_bitsandbytes = "betas" in saved and not {"amsgrad", "maximize", "foreach"} & saved.keys()
    if of_bitsandbytes or "optim_bits" in saved:
        return  # or ours, from before the algorithm was saved
    needed = set(own) & set(optimizer.defaults) - {*structure, *_OPTIONAL, "params", "param_names", "initial_lr"}
    missing, foreign = sorted(needed - set(saved)), sorted(_HYPERPARAMETERS & set(saved) - set(own))
    if missing or foreign or kind not in _OF_TORCH:
        known = sorted(set(saved) - {*_IGNORED, "params", "param_names"})
        lacks = f" and no {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"parameter group {number} of the loaded state dict is not one of {kind}, which {name} is: it has "
            f"{', '.join(known)}{lacks}. Load it into the optimizer with these settings, or start {name} without it."
        )


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
        if any(value is not None for value in values.values()):  # torch's SGD keeps a buffer of None
            loaded[p] = _load_one(values, p, config, optimizer._rule(config), key)
    return loaded


def _load_one(values: dict[str, Any], p: Tensor, config: dict[str, Any], rule: Rule, key: Any) -> dict[str, Any]:
    if BNB_KEY in values or "state1" in values:
        values = _from_bnb(values, p, rule, key)
    known = {"step", "compensation"} | {n for spec in rule.states for n in (spec.name, states.absmax_key(spec.name))}
    if others := sorted(k for k, v in values.items() if k not in known and v is not None):
        wanted = ", ".join(spec.name for spec in rule.states) or "none"
        raise ValueError(
            f"state of parameter {key!r} holds {', '.join(others)}, which this optimizer does not have (its states: "
            f"{wanted}): the checkpoint is another algorithm's, or has other settings"
        )
    if "step" not in values and "momentum_buffer" in values:
        values = {**values, "step": 1.0}  # torch's SGD and Muon count none; the buffer shows that there was one
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
            raise ValueError(f"state of parameter {key!r} has no {spec.name!r}; it has {', '.join(sorted(values))}")
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
        wanted = ", ".join(spec.name for spec in rule.states) or "none"
        raise ValueError(
            f"bitsandbytes state of parameter {key!r} holds {len(sources)} tensors, this optimizer has "
            f"{len(rule.states)} ({wanted}): the checkpoint is another algorithm's"
        )
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
