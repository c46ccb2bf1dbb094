"""Checkpoints that torch.optim and bitsandbytes wrote: whose they are, and their settings and states under our names.

bitsandbytes keeps `state1`, `state2` (fp32, or codes with `qmap*` and `absmax*`) below the key
`__bnb_optimizer_quant_state__` of each parameter, older versions directly in the parameter's state; AdEMAMix stacks two
states in `state1`. Codes are taken over bit for bit where map, sign and block size are ours, else re-quantized; but for
second moments that were rounded to 0 beside a momentum that was not, see `_smallest_code`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from kbit.formats.codebooks import codebook
from kbit.optim import state as states
from kbit.optim.rules import LARS_TRUST, Rule, StateSpec

BNB_KEY = "__bnb_optimizer_quant_state__"
#: A key of saved groups (of no live one): the algorithm whose states these are.
ALGORITHM_KEY = "algorithm"
# Settings of torch.optim and bitsandbytes that choose an implementation, not a result.
IGNORED = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")
# Settings that checkpoints of the same algorithm from elsewhere may lack.
_OPTIONAL = frozenset({"max_unorm", "skip_zeros", "use_muon", "betas", "adamw_eps"})
# Settings of torch.optim that tell its algorithms apart.
_HYPERPARAMETERS = frozenset(
    {"betas", "momentum", "dampening", "nesterov", "alpha", "centered", "lr_decay", "ns_steps"}
)
_HYPERPARAMETERS |= {"eps", "momentum_decay", "rho", "lambd", "t0", "etas", "step_sizes"}
# Algorithms that torch.optim has too, whose checkpoints name none.
_OF_TORCH = frozenset({"adam", "adamw", "sgd", "rmsprop", "adagrad", "muon"})
_ADAMS = ("adam", "adamw", "lamb")


def check_algorithm(
    name: str, kind: str, number: int, own: Mapping[str, Any], saved: Mapping[str, Any], needed: Collection[str]
) -> None:
    """Raise ValueError for a group that another algorithm than `kind`, that of optimizer `name`, has saved.

    number, own, saved: the group's place, as it is here and in the checkpoint. needed: the settings of `kind`.
    Our groups say whose they are. Others tell by their settings: those of torch.optim have all that the algorithm
    needs, those of bitsandbytes file whatever there is under `betas` and `eps`.
    """
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
    if ALGORITHM_KEY in saved or "optim_bits" in saved:
        return  # ours, the latter from before the algorithm was saved
    if "betas" in saved and not {"amsgrad", "maximize", "foreach"} & saved.keys():
        _check_bnb_group(name, kind, number, saved)
    else:
        _check_torch_group(name, kind, number, own, saved, needed)


def _check_torch_group(
    name: str, kind: str, number: int, own: Mapping[str, Any], saved: Mapping[str, Any], needed: Collection[str]
) -> None:
    missing = {key for key in needed if key not in _OPTIONAL and key not in saved}
    if kind in ("adam", "adamw") and "amsgrad" not in saved:
        missing.add("amsgrad")  # of torch's algorithms with these settings, RAdam and Adamax lack it
    foreign = _HYPERPARAMETERS & set(saved) - set(own)
    if missing or foreign or kind not in _OF_TORCH:
        known = sorted(set(saved) - {*IGNORED, "params", "param_names"})
        lacks = f" and no {', '.join(sorted(missing))}" if missing else ""
        raise ValueError(
            f"parameter group {number} of the loaded state dict is not one of {kind}, which {name} is: it has "
            f"{', '.join(known)}{lacks}. Load it into the optimizer with these settings, or start {name} without it."
        )


def _check_bnb_group(name: str, kind: str, number: int, saved: Mapping[str, Any]) -> None:
    betas, eps = saved["betas"], saved.get("eps")
    if kind in (source := _algorithms_of_bnb(saved)):
        return
    hint = ""
    if kind in ("sgd", "lars") and "lion" in source:
        hint = " If it is of SGD with dampening, which bitsandbytes ignores, set the second of betas to 0 in it."
    raise ValueError(
        f"parameter group {number}: the loaded state dict is bitsandbytes' of {' or '.join(source)} (betas={betas!r}, "
        f"eps={eps!r}), but {name} is {kind}, whose states mean something else. Load it into an optimizer of "
        f"{source[0]}, or start {name} without it.{hint}"
    )


def _algorithms_of_bnb(saved: Mapping[str, Any]) -> tuple[str, ...]:
    """The algorithms of which bitsandbytes may have saved a group.

    betas is (momentum, dampening) of SGD and LARS, (alpha, momentum) of RMSprop, (0, 0) of Adagrad; eps is 0 of SGD,
    LARS and Lion. `alpha` is saved with two states, before version 0.44 with none.
    """
    betas = tuple(saved["betas"]) if isinstance(saved["betas"], (list, tuple)) else ()
    if len(betas) != 2:
        return ("ademamix",)
    if "alpha" in saved:
        return _ADAMS
    if not saved.get("eps"):
        return ("lion",) if betas[1] else ("sgd", "lars")
    if not betas[1]:
        return ("rmsprop",) if betas[0] else ("adagrad",)
    return ("rmsprop", *_ADAMS)


def settings_from_bnb(own: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
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


def state_from_bnb(values: Mapping[str, Any], p: Tensor, rule: Rule, where: str) -> dict[str, Any]:
    """bitsandbytes' state of one parameter under our names. where: what errors call the parameter."""
    wrapped = values.get(BNB_KEY, {})
    if not isinstance(wrapped, Mapping):
        raise ValueError(f"bitsandbytes state of {where}: {BNB_KEY} is a {type(wrapped).__name__}, not a dict")
    values = {**values, **wrapped}
    for key in (f"{kind}{number}" for kind in ("state", "absmax", "qmap") for number in (1, 2)):
        if values.get(key) is not None and not isinstance(values[key], Tensor):
            raise ValueError(f"bitsandbytes state {key!r} of {where} is a {type(values[key]).__name__}, not a tensor")
    out: dict[str, Any] = {"step": values["step"]} if "step" in values else {}
    sources: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for number in (1, 2):
        stored = values.get(f"state{number}")
        if stored is None:
            continue
        absmax, qmap = values.get(f"absmax{number}"), values.get(f"qmap{number}")
        if stored.dim() == p.dim() + 1 and stored.shape[1:] == p.shape:
            scales = absmax if absmax is not None else [None] * len(stored)
            if len(scales) != len(stored):
                raise ValueError(
                    f"bitsandbytes state of {where}: absmax{number} has {len(scales)} rows, not {len(stored)}"
                )
            sources += [(part, scale, qmap) for part, scale in zip(stored, scales, strict=True)]
        else:
            sources.append((stored, absmax, qmap))
    if len(sources) != len(rule.states):
        wanted = ", ".join(spec.name for spec in rule.states) or "none"
        raise ValueError(
            f"bitsandbytes state of {where} holds {len(sources)} tensors, this optimizer has "
            f"{len(rule.states)} ({wanted}): the checkpoint is another algorithm's"
        )
    if rule.norm == LARS_TRUST and rule.states:
        raise ValueError(
            f"bitsandbytes state of {where} is a buffer of whole gradients, but LARS here keeps gradients times the "
            "trust ratio: its first steps would be far too large. Start LARS without the checkpoint's states"
        )
    moving = torch.zeros((), dtype=torch.bool)  # elements that have momentum
    for spec, (stored, absmax, qmap) in zip(rule.states, sources, strict=True):
        if stored.numel() != p.numel():
            raise ValueError(f"bitsandbytes state of {where} has {stored.numel()} elements, not {p.numel()}")
        stored = stored.reshape(p.shape)
        if stored.dtype != torch.uint8:
            out[spec.name] = stored
        elif absmax is None or qmap is None:
            raise ValueError(
                f"bitsandbytes state of {where} is not block-wise (an old layout); load it with bitsandbytes "
                "and save fp32 states"
            )
        else:
            check_scales(absmax, f"absmax of {spec.name}", where)
            decoded = _decode(stored, absmax, qmap, where)
            if spec.signed:
                moving = moving.to(stored.device) | (decoded != 0)
            elif (lost := moving.to(stored.device) & (decoded == 0)).any():
                stored = torch.where(lost, _smallest_code(qmap), stored)
                decoded = _decode(stored, absmax, qmap, where)
            if _is_ours(stored, absmax, qmap, spec):
                out[spec.name], out[states.absmax_key(spec.name)] = stored, absmax
            else:
                out[spec.name] = decoded
    return out


def check_scales(scales: Tensor, name: str, where: str) -> None:
    """Raise ValueError unless block scales are finite and not negative; waits for their device."""
    if not bool(((scales >= 0) & (scales < math.inf)).all()):
        raise ValueError(
            f"state {name!r} of {where} holds block scales that are negative, infinite or NaN: it is damaged"
        )


def _smallest_code(qmap: Tensor) -> Tensor:
    """The code of the smallest positive value of a map.

    It stands for second moments that were rounded to 0 beside much larger ones, while there is momentum. Their next
    step would else divide old momentum by the root of the next square alone: up to 1 / sqrt(1 - beta2), 31 for 0.999,
    times too large a step.
    """
    return qmap.float().masked_fill(qmap <= 0, float("inf")).argmin().to(torch.uint8)


def _is_ours(codes: Tensor, absmax: Tensor, qmap: Tensor, spec: StateSpec) -> bool:
    own = codebook(states.codebook_name(spec.signed), qmap.device)
    return torch.equal(qmap.float(), own) and absmax.numel() == -(-codes.numel() // states.BLOCK_SIZE)


def _decode(codes: Tensor, absmax: Tensor, qmap: Tensor, where: str) -> Tensor:
    """fp32 values of codes under any 256-entry map, in blocks of 256 or, in old checkpoints, 2048."""
    block = next((b for b in (256, 2048) if absmax.numel() == -(-codes.numel() // b)), None)
    if block is None or qmap.numel() != 256:
        raise ValueError(
            f"bitsandbytes state of {where}: {absmax.numel()} block scales and a map of {qmap.numel()} entries for "
            f"{codes.numel()} codes fit no known block size"
        )
    values = qmap.float()[codes.reshape(-1).long()]
    return (values * absmax.float().repeat_interleave(block)[: values.numel()]).view(codes.shape)
