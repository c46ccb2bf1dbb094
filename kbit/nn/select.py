"""Which modules of a model are quantized: the one rule that conversion, loading and planning share."""

from __future__ import annotations

import fnmatch
import logging
import sys
from collections.abc import Hashable

from torch import nn

from kbit.config import KbitConfig

logger = logging.getLogger("kbit")


def is_linear(module: nn.Module) -> bool:
    """nn.Linear itself or transformers' Conv1D. A subclass may read its weight directly, so it stays as it is."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored `[in, out]`."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def is_embedding(module: nn.Module) -> bool:
    """nn.Embedding itself; one with max_norm rewrites its rows in forward and is left alone."""
    return type(module) is nn.Embedding and module.max_norm is None


# Parameters of a fused experts module that are weights; gate and up are one where the model has a gate.
EXPERT_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def is_fused_experts(module: nn.Module) -> bool:
    """A fused experts module of transformers 5: its forward goes through a registry, or is Llama 4's."""
    return all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "config")) or is_llama4_experts(module)


def is_llama4_experts(module: nn.Module) -> bool:
    """Llama 4's experts multiply with `torch.bmm`, every expert the same number of rows."""
    cls = type(module)
    version = str(getattr(sys.modules.get("transformers"), "__version__", "0"))
    return cls.__name__ == "Llama4TextExperts" and int(version.partition(".")[0]) >= 5


def matches(name: str, patterns: list[str]) -> bool:
    """True where a pattern names the module, something above it, or consecutive parts of its dotted path; globs too."""
    return any(fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*") for pattern in patterns)


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The modules that turn features into the model's output, which are not quantized by default.

    Models with `get_output_embeddings` (transformers) say so themselves. Without one, a transformers model's linear
    layers outside its base model are its heads (classifier, score, qa_outputs), and any other model has none but
    those named `lm_head`.
    """
    getter = getattr(model, "get_output_embeddings", None)
    if getter is not None:
        try:
            head = getter()
        except (AttributeError, NotImplementedError):
            head = None
        if head is not None:
            return set(head.modules())
        base = getattr(model, "base_model", model)
        if base is not model:
            inside = set(base.modules())
            return {m for m in model.modules() if is_linear(m) and m not in inside}
    return {m for name, m in model.named_modules() if name.split(".")[-1] == "lm_head"}


def _weight(module: nn.Module) -> nn.Parameter | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.is_floating_point() else None


def declared_tie(model: nn.Module) -> list[nn.Module]:
    """[input embedding, output head] where a transformers config ties them and both are on the meta device.

    There they need not share a Parameter: before they are loaded, and where accelerate has put them on disk.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if not getattr(config, "tie_word_embeddings", False) or not getattr(model, "_tied_weights_keys", None):
        return []
    try:
        pair = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    # Weights that are loaded speak for themselves: a model may have been untied since.
    weights = [None if module is None else module._parameters.get("weight") for module in pair]
    return pair if all(weight is not None and weight.is_meta for weight in weights) else []


def tied_groups(model: nn.Module) -> list[list[nn.Module]]:
    """Groups of modules that share one weight, under whatever name (each group has at least two)."""
    owners: dict[Hashable, list[nn.Module]] = {}
    weights = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                key = _storage_key(parameter)
                owners.setdefault(key, []).append(module)
                if name == "weight":
                    weights.add(key)
    groups = [group for key, group in owners.items() if len(group) > 1 and key in weights]
    declared = [module for module in declared_tie(model) if _weight(module) is not None]
    if len(declared) > 1 and not any(set(declared) <= set(group) for group in groups):
        groups.append(declared)
    return groups


def _storage_key(parameter: nn.Parameter) -> Hashable:
    """What two Parameters have in common that hold the same values in the same place, whether or not they are one."""
    try:
        storage = parameter.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # subclasses without a storage of their own, such as DTensor
        return id(parameter)
    return storage, parameter.storage_offset(), parameter.shape, parameter.stride()


def routers(model: nn.Module) -> set[nn.Module]:
    """The small layers that choose experts: rounding them would send tokens elsewhere, and saves nothing."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if "experts" in module._modules:
            found.update(m for name in ("gate", "router") if (m := module._modules.get(name)) is not None)
    return found


def select_modules(model: nn.Module, config: KbitConfig) -> dict[str, nn.Module]:
    """The modules of `model` that `config` quantizes, by their first name, in the order of the module tree.

    Works on the meta device too. Modules that share a weight are quantized together or not at all; a linear layer tied
    to an embedding follows the embedding. Modules that a transformers model keeps in fp32 are left out.
    """
    heads = output_heads(model) if config.skip_modules is None else set()
    for pattern in config.skip_modules or []:
        if not any(matches(name, [pattern]) for name, _ in model.named_modules()):
            logger.warning("skip_modules names %r, which matches no module of this %s", pattern, type(model).__name__)
    skipped = list(config.skip_modules or [])
    skipped += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    skipped += list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    groups = tied_groups(model)
    tied_to_embedding = {m for group in groups if any(isinstance(g, nn.Embedding) for g in group) for m in group}

    left_alone = _adapter_modules(model) | routers(model)

    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if module in left_alone:
            continue
        if config.quantize_embeddings and isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
            # A subclass may scale or shift what it looks up.
            if type(module).__module__.partition(".")[0] != "kbit":
                logger.warning(
                    "%s is a %s, not a plain nn.Embedding, and is not quantized", name, type(module).__name__
                )
        wanted = is_linear(module) or (is_embedding(module) and config.quantize_embeddings)
        if not wanted or _weight(module) is None or matches(name, skipped):
            continue
        if module in heads and module not in tied_to_embedding:
            continue
        chosen[name] = module

    for group in groups:
        # Every member must be selected and store the weight the same way round, or the weight would exist twice.
        if not set(group) <= set(chosen.values()) or len({is_conv1d(module) for module in group}) > 1:
            chosen = {name: module for name, module in chosen.items() if module not in group}
    if config.quantize_experts:
        _warn_of_experts(model)
    return chosen


def _adapter_modules(model: nn.Module) -> set[nn.Module]:
    """What PEFT's layers train (lora_A, lora_B ...): it stays in floating point, only their base is quantized."""
    adapters: set[nn.Module] = set()
    for module in model.modules():
        for name in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())):
            part = module._modules.get(name.partition(".")[0])
            if part is not None:
                adapters.update(part.modules())
    return adapters


def select_experts(model: nn.Module, config: KbitConfig) -> dict[str, tuple[nn.Module, str]]:
    """The fused expert weights that `config` quantizes: full name -> (experts module, name of its Parameter)."""
    skipped = list(config.skip_modules or [])
    return {
        f"{name}.{projection}": (module, projection)
        for name, module in model.named_modules()
        if config.quantize_experts and is_fused_experts(module)
        for projection in EXPERT_PROJECTIONS
        if (weight := module._parameters.get(projection)) is not None
        and weight.dim() == 3
        and weight.is_floating_point()
        and not matches(f"{name}.{projection}", skipped)
    }


def _warn_of_experts(model: nn.Module) -> None:
    """Fused expert weights that kbit cannot quantize keep their dtype, and that must not go unnoticed."""
    for name, module in model.named_modules():
        if is_fused_experts(module):
            continue
        fused = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()]
        if fused and "experts" in type(module).__name__.lower():
            which = ", ".join(fused)
            logger.warning(
                "%s: expert weights of a kind that is not quantized keep their dtype (%s); those that transformers 4 "
                "fuses are quantized under transformers 5",
                name,
                which,
            )
            return
