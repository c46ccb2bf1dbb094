"""PEFT's targets on a model whose fused experts are quantized: what they can reach, and an error for what they cannot.

Fused experts are 3-D Parameters that PEFT adapts through `target_parameters`. Where they are quantized there is no such
Parameter (an `ExpertWeight` module holds codes under its name), so PEFT would match nothing, and says so at most in a
warning. It also rewrites targets of transformers 4 (`w1`, `gate_proj`, and "all-linear", which stood for the experts
and the router too) into `target_parameters`, which here could hit the router alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from kbit.nn.experts import ExpertWeight

logger = logging.getLogger("kbit")

_ALL_LINEAR = "all-linear"
# What the projections of an expert are called where each expert is a module of linear layers.
_SINGLE_EXPERT_NAMES = frozenset({"w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})


def inject_adapter(
    original: Callable[..., Any], tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Refuse targets that are quantized experts, before PEFT has changed anything of the model."""
    experts = _packed(model)
    if experts:
        config = tuner.peft_config[adapter_name]
        _refuse(tuner, config, model, experts)
        targets = getattr(config, "target_modules", None)
        if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
            logger.warning(
                "target_modules='all-linear': the experts (%s and %d more) are quantized in one piece and get no "
                "adapters, nor do their routers; to adapt both, load with KbitConfig(quantize_experts=False)",
                next(iter(experts)),
                len(experts) - 1,
            )
    return original(tuner, model, adapter_name, *args, **kwargs)


def convert_config(original: Callable[..., None], config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Targets stay as they were named where the experts are quantized: "all-linear" are the linear layers there are."""
    if not _packed(model):
        original(config, model, *args, **kwargs)


def _packed(model: nn.Module) -> dict[str, ExpertWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertWeight)}


def _refuse(tuner: Any, config: Any, model: nn.Module, experts: dict[str, ExpertWeight]) -> None:
    for target in sorted(getattr(config, "target_parameters", None) or ()):
        if found := _matches(target.removesuffix(".weight"), experts):
            raise ValueError(_message("target_parameters", target, found, experts[found]))
    targets = getattr(config, "target_modules", None)
    if not targets or (isinstance(targets, str) and targets.lower() == _ALL_LINEAR):
        return
    for name, layer in experts.items():
        if tuner._check_target_module_exists(config, name):
            named = targets if isinstance(targets, str) else next((t for t in targets if _matches(t, [name])), targets)
            raise ValueError(_message("target_modules", named, name, layer))
    others = [name for name, module in model.named_modules() if not isinstance(module, ExpertWeight)]
    if isinstance(targets, str):
        found = next((name for name in experts if any(re.fullmatch(targets, s) for s in _single_names(name))), None)
        if found is None:
            return
        if not any(name and tuner._check_target_module_exists(config, name) for name in others):
            raise ValueError(_message("target_modules", targets, found, experts[found]))
        logger.warning(
            "%s Here it adapts the other modules that it names.",
            _message("target_modules", targets, found, experts[found]),
        )
        return
    for target in sorted(targets):
        if not _matches(target, others) and target.rpartition(".")[2] in _SINGLE_EXPERT_NAMES:
            found = next(iter(experts))
            raise ValueError(_message("target_modules", target, found, experts[found]))


def _single_names(name: str) -> list[str]:
    """What the layers of single experts were called that `name` holds in one piece (Mixtral's under another module)."""
    parent = name.rpartition(".")[0]
    parents = {parent, parent.replace(".mlp.", ".block_sparse_moe.")}
    return [f"{place}.0.{single}" for place in sorted(parents) for single in sorted(_SINGLE_EXPERT_NAMES)]


def _matches(target: str, names: Iterable[str]) -> str | None:
    """The first of `names` that PEFT takes `target` for: the whole name or its end."""
    return next((name for name in names if name == target or name.endswith(f".{target}")), None)


def _message(setting: str, target: str, name: str, layer: ExpertWeight) -> str:
    return (
        f"{setting} names {target!r}, but {name} holds {layer.weight_format.label} codes of {layer.weight_shape[0]} "
        "experts in one piece, and LoRA on codes would train without effect. Leave the experts out of the targets, or "
        "adapt them in 16 bits: load the model with KbitConfig(quantize_experts=False)."
    )
