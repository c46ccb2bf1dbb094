"""Tied weights: a quantized weight is several Parameters, and all of them must be tied, declared and saved once.

transformers ties and declares `lm_head.weight` alone. Here the scales that belong to it are declared too, so that
`save_pretrained` drops them with the codes and loading ties them again instead of reporting them missing.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from kbit.nn.base import PART_NAMES, QuantizedModule

Groups = list[list[str]]


def tie_before_loading(model: Any) -> None:
    """Make a model that was built without tying share its Parameters as it declares (transformers 5, meta device).

    What selects the modules recognises tied weights by identity; transformers ties only after loading.
    """
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        parent, _, name = target.rpartition(".")
        try:
            module, parameter = model.get_submodule(parent), model.get_parameter(source)
        except AttributeError:  # a buffer, or not a plain name
            continue
        if name in module._parameters and module._parameters[name].shape == parameter.shape:
            module._parameters[name] = parameter


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """Every quantized module by name; one that hangs in several places (T5's table) by each of its names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, QuantizedModule)}


def groups_of(model: nn.Module) -> Groups:
    """Names of the quantized modules that share one weight, group by group (each of at least two)."""
    by_weight: dict[int, list[str]] = {}
    for name, module in quantized_modules(model).items():
        by_weight.setdefault(id(module.weight), []).append(name)
    return [names for names in by_weight.values() if len(names) > 1]


def declare(model: Any, groups: Groups) -> None:
    """Declare the scales of tied modules wherever the model declares their weights, on this instance only."""
    declared = _declared_patterns(model)
    mapping = getattr(model, "all_tied_weights_keys", None)
    new: dict[str, str] = {}
    for names in groups:
        targets = [n for n in names if any(re.search(pattern, f"{n}.weight") for pattern in declared)]
        sources = [n for n in names if n not in targets] or names[:1]
        parts = [part for part in model.get_submodule(names[0]).parts() if part != "weight"]
        new.update({f"{t}.{part}": f"{sources[0]}.{part}" for t in targets if t != sources[0] for part in parts})
    if not new:
        return
    if isinstance(mapping, dict):
        model.all_tied_weights_keys = {**mapping, **new}
    own = model._tied_weights_keys
    model._tied_weights_keys = {**(own or {}), **new} if _is_mapping(model) else [*(own or []), *new]


def undeclare(model: Any) -> None:
    """Take the declarations of `declare` back, once nothing is quantized any more."""
    scales = tuple(f".{part}" for part in PART_NAMES if part != "weight")
    if "_tied_weights_keys" in vars(model):
        del model._tied_weights_keys
    mapping = getattr(model, "all_tied_weights_keys", None)
    if isinstance(mapping, dict):
        model.all_tied_weights_keys = {key: value for key, value in mapping.items() if not key.endswith(scales)}


def share(model: nn.Module, groups: Groups, leader: str, part: str) -> None:
    """Give every module of `leader`'s group the Parameter `part` of `leader`."""
    parameter = model.get_submodule(leader)._parameters[part]
    for names in groups:
        if leader in names:
            for name in names:
                model.get_submodule(name)._parameters[part] = parameter


def trim_biases(model: nn.Module, groups: Groups) -> None:
    """Undo transformers' padding of a tied head's bias, which takes the first size of the codes for the vocabulary.

    That holds in the row layout; flat codes (K not a multiple of the block size) are longer than the vocabulary.
    """
    for name in (name for names in groups for name in names):
        module: Any = model.get_submodule(name)
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.Tensor) and bias.shape[0] > module.out_features:
            bias.data = bias.data[: module.out_features].clone()


def _is_mapping(model: Any) -> bool:
    return isinstance(getattr(model, "all_tied_weights_keys", None), dict)


def _declared_patterns(model: nn.Module) -> list[str]:
    patterns: list[str] = []
    for prefix, module in model.named_modules():
        # A mapping in transformers 5, a list in version 4; both iterate over what is dropped when saving.
        keys: Any = getattr(module, "_tied_weights_keys", None) or []
        patterns.extend(f"{prefix}.{key}" if prefix else key for key in keys)
    return patterns
