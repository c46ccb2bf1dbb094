"""Weights that accelerate keeps on disk or in CPU memory: make its maps hold quantized weights, and read them back.

transformers offloads by noting where a tensor lies in the checkpoint. For a weight that is quantized while loading
that is still the floating point one, and version 4 also notes one dtype for every tensor. So after dispatch each
offloaded quantized weight is looked up, quantized if need be, and entered into the map as a view of a mapped file,
which takes no memory until it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kbit.integrations.transformers.keys import fit
from kbit.integrations.transformers.pieces import quantize_in_pieces
from kbit.nn.base import QuantizedModule
from kbit.nn.convert import is_conv1d_class
from kbit.nn.experts import ExpertWeight


def is_offloaded(module: nn.Module) -> bool:
    """True where a Parameter of the module itself is elsewhere and fetched for each forward pass."""
    return any(p is not None and p.is_meta for p in module._parameters.values())


def weights_map(module: nn.Module) -> tuple[Any, str] | None:
    """The map that accelerate's hook reads this module's weights from, and the prefix of their names in it."""
    hook = getattr(module, "_hf_hook", None)
    for inner in getattr(hook, "hooks", None) or [hook]:
        found: Any = getattr(inner, "weights_map", None)
        prefix = ""
        while hasattr(found, "dataset"):
            prefix = found.prefix + prefix
            found = found.dataset
        if found is not None and getattr(inner, "offload", False):
            return found, prefix
    return None


def lookup(found: Any, key: str) -> Tensor:
    """One tensor of a weights map as it is stored: on the CPU, in its own dtype, a view of the file where it is one."""
    in_memory = found if not hasattr(found, "index") else found.state_dict
    if key in in_memory:
        return in_memory[key]
    info = found.index[key]
    if info.get("safetensors_file") is None:
        return torch.as_tensor(found[key])
    from safetensors import safe_open

    with safe_open(info["safetensors_file"], framework="pt", device="cpu") as file:
        return file.get_tensor(info.get("weight_name", key))


def settle(names: list[str], module: QuantizedModule, modules: Mapping[str, QuantizedModule]) -> None:
    """Enter the parts of an offloaded quantized weight under every name that shares it.

    names: of the modules that share the weight; `module` is any of them. Raises ValueError where the weight is nowhere
    to be found, or where it must be written and no offload_folder was given.
    """
    maps = {name: weights_map(modules[name]) for name in names}
    source = next(
        ((found, prefix) for found, prefix in filter(None, maps.values()) if _holds(found, f"{prefix}weight")), None
    )
    if source is None:
        raise ValueError(f"{names[0]}.weight was neither loaded nor offloaded")
    found, prefix = source
    raw = lookup(found, f"{prefix}weight")
    if raw.is_floating_point():
        parts = _quantize_to_disk(raw, names[0], module, found)
    else:
        key = prefix.removesuffix(".")
        parts = {p: fit(f"{key}.{p}", lookup(found, f"{prefix}{p}"), module, p) for p in module.parts()}
    placeholders = {p: nn.Parameter(t.to("meta"), requires_grad=False) for p, t in parts.items()}
    for name in names:
        modules[name].set_parts(placeholders)
        place = maps[name]
        if place is None:
            raise ValueError(f"{name} shares an offloaded weight but is not offloaded itself; place both together")
        for part, tensor in parts.items():
            _enter(place[0], place[1] + part, tensor)


def _holds(found: Any, key: str) -> bool:
    return key in found if not hasattr(found, "index") else key in found.state_dict or key in found.index


def _enter(found: Any, key: str, tensor: Tensor) -> None:
    if not hasattr(found, "index"):
        found[key] = tensor
        return
    found.state_dict[key] = tensor  # looked at before the index
    if key not in found.all_keys:
        found.all_keys.append(key)


def _quantize_to_disk(raw: Tensor, name: str, module: QuantizedModule, found: Any) -> dict[str, Tensor]:
    folder = getattr(found, "save_folder", None)
    if folder is None:
        raise ValueError(f"{name} is offloaded to disk and quantized while loading: pass offload_folder=")
    from safetensors.torch import save_file

    raw = raw.to(module.weight_dtype)
    weight = raw.t() if is_conv1d_class(module.original_class) else raw
    if isinstance(module, ExpertWeight) and module.transposed:
        weight = raw.transpose(1, 2)
    parts = quantize_in_pieces(weight, module.weight_format, f"{name}.weight")
    os.makedirs(folder, exist_ok=True)
    file = os.path.join(folder, f"{name}.kbit.safetensors")
    save_file({f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}, file)
    from safetensors import safe_open

    with safe_open(file, framework="pt", device="cpu") as mapped:
        return {part: mapped.get_tensor(f"{name}.{part}") for part in parts}


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with offloaded tensors looked up; what is shared stays shared."""
    state = model.state_dict()
    cache: dict[int, Tensor] = {}
    for key, tensor in state.items():
        if not tensor.is_meta:
            continue
        name, _, last = key.rpartition(".")
        module = model.get_submodule(name)
        place = weights_map(module)
        if place is None:
            continue
        owner = module._parameters.get(last, module._buffers.get(last))
        if id(owner) not in cache:
            value = lookup(place[0], place[1] + last)
            cache[id(owner)] = value.to(tensor.dtype)
        state[key] = cache[id(owner)]
    return state
