"""Quantize a whole model in place, and back. Explicit: nothing happens in `.to()` or in `forward`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kbit.config import KbitConfig
from kbit.nn import experts
from kbit.nn.base import QuantizedModule
from kbit.nn.embedding import Embedding4bit, Embedding8bit
from kbit.nn.linear import Linear4bit, Linear8bit
from kbit.nn.select import declared_tie, is_conv1d, is_linear, select_experts, select_modules, tied_groups
from kbit.ops.quantize import check_quantizable

logger = logging.getLogger("kbit")

# The same dict objects go over, so that the handles which remove hooks keep working.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_Places = dict[int, list[tuple[nn.Module, str]]]

# Called with the model after a conversion: integrations keep what a library stores about a quantized model in step.
on_quantized: list[Callable[[nn.Module, KbitConfig], None]] = []
on_dequantized: list[Callable[[nn.Module], None]] = []


@torch.inference_mode(False)  # what is converted in inference mode must still serve training
def quantize_model(model: nn.Module, config: KbitConfig | None = None) -> nn.Module:
    """Quantize the linear layers (and, if asked, the embeddings) of any module tree in place.

    model: any nn.Module. nn.Linear, nn.Embedding and transformers' Conv1D are converted, each on its own device, and
        the floating point weight is freed as soon as its codes exist. Weights that are tied stay tied.
    config: what and how; see KbitConfig. None takes its defaults: NF4 with double quantization.

    Returns the model (another object only if the model itself is one linear layer or embedding). Raises ValueError
    that names the tensor for NaN, infinity and meta weights, TypeError for a dtype that cannot be quantized, before
    anything is changed.
    """
    config = KbitConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, KbitConfig):
        raise TypeError(f"config must be a KbitConfig, got {type(config).__name__}")
    selected = select_modules(model, config)
    for name, module in selected.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        check_quantizable(weight, f"tensor {_key(name)!r}")
    fused = select_experts(model, config)
    for name, (module, projection) in fused.items():
        check_quantizable(module._parameters[projection], f"tensor {name!r}")  # type: ignore[arg-type]
    if not selected and not fused:
        already = any(isinstance(module, QuantizedModule) for module in model.modules())
        why = "its layers are quantized already; kbit.dequantize_model comes before another format"
        logger.warning(
            "nothing in this %s was quantized: %s",
            *(type(model).__name__, why if already else "it has no linear layers but those that are skipped"),
        )
        if already:
            return model
    _warn_of_compute_dtype(selected, config)

    leaders = _leaders(model, selected)
    places = _places(model)
    converted: dict[str, QuantizedModule] = {}
    for name in list(selected):
        module = selected.pop(name)  # the last reference beside the tree's: replacing the module frees its weight
        layer = empty_like(module, config)
        leader = converted.get(leaders.get(name, ""))
        if leader is not None:
            layer.set_parts(leader.parts())
            layer.weight_dtype = leader.weight_dtype
        else:
            layer.quantize_from(weight_of(module), _key(name))
        if name in leaders:
            converted[name] = layer
        model = _replace(model, places, module, layer)
    for name, (module, projection) in fused.items():
        weight = module._parameters[projection].detach()  # type: ignore[union-attr]
        experts_layer = experts.empty_expert_weight(module, projection, config, "meta")
        experts_layer.quantize_from(weight.transpose(1, 2) if experts_layer.transposed else weight, name)
        experts.install(module, projection, experts_layer)
        del weight
    _switch_fused_paths(model)
    for listener in on_quantized:
        listener(model, config)
    return model


@torch.inference_mode(False)
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every quantized layer of `model` back into the class it was, in place, with its dequantized weight.

    dtype: of the weights; None gives each the dtype that was quantized, or the one that `.half()`, `.to(dtype)` and the
        like have made of the model since.

    Tied weights stay tied. Returns the model (another object only if the model itself is one quantized layer).
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, experts.ExpertWeight):
                experts.uninstall(parent, name, dtype)
    places = _places(model)
    shared: dict[int, nn.Parameter] = {}
    quantized = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    # Codes of tied layers stay alive in the list below until the end, so that an id is never reused.
    alive = [module.weight for module in quantized]
    for module, codes in zip(quantized, alive, strict=True):
        if id(codes) not in shared:
            weight = module.dequantize(dtype or module.cast_dtype)
            if is_conv1d_class(module.original_class):
                weight = weight.t().contiguous()
            shared[id(codes)] = nn.Parameter(weight, requires_grad=module.weight_requires_grad)
        model = _replace(model, places, module, _restored(module, shared[id(codes)]))
    _switch_fused_paths(model)
    for listener in on_dequantized:
        listener(model)
    return model


def replace_empty(model: nn.Module, config: KbitConfig) -> dict[str, QuantizedModule]:
    """Swap the modules that `config` selects for quantized ones that hold zeros, on the same device (meta too).

    For loaders that fill in codes later. Returns the new modules by name; tied ones share their Parameters.
    """
    selected = select_modules(model, config)
    _warn_of_compute_dtype(selected, config)
    leaders = _leaders(model, selected)
    places = _places(model)
    new: dict[str, QuantizedModule] = {}
    for name, module in selected.items():
        new[name] = layer = empty_like(module, config, device=module.weight.device)  # type: ignore[arg-type]
        leader = new.get(leaders.get(name, name))
        if leader is not None and leader is not layer:
            layer.set_parts(leader.parts())
        _replace(model, places, module, layer)
    for name, (module, projection) in select_experts(model, config).items():
        device = module._parameters[projection].device  # type: ignore[union-attr]
        new[name] = expert_layer = experts.empty_expert_weight(module, projection, config, device)
        experts.install(module, projection, expert_layer)
    _switch_fused_paths(model)
    return new


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a convertible module as `[N, K]`: Conv1D's is stored `[K, N]`."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.t() if is_conv1d(module) else weight


def empty_like(module: nn.Module, config: KbitConfig, device: torch.device | str = "meta") -> QuantizedModule:
    """The quantized layer that replaces `module`, with its bias, mode and hooks, and no weight yet."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    fmt = config.weight_format
    where: dict[str, Any] = {"device": device, "dtype": weight.dtype}
    layer: QuantizedModule
    if is_linear(module):
        k, n = weight.shape if is_conv1d(module) else reversed(weight.shape)
        where["compute_dtype"] = config.compute_dtype
        if fmt.is_4bit:
            layer = Linear4bit(k, n, False, format=fmt, **where)
        else:
            threshold, asked = config.outlier_threshold, config.int8_activations
            layer = Linear8bit(k, n, False, outlier_threshold=threshold, int8_activations=asked, **where)
        layer.bias = module.bias  # type: ignore[assignment]
    else:
        assert isinstance(module, nn.Embedding)
        rows, dim = weight.shape
        if fmt.is_4bit:
            layer = Embedding4bit(rows, dim, module.padding_idx, format=fmt, **where)
        else:
            layer = Embedding8bit(rows, dim, module.padding_idx, **where)
        layer.scale_grad_by_freq, layer.sparse = module.scale_grad_by_freq, module.sparse
    layer.original_class = type(module)
    layer.weight_requires_grad = weight.requires_grad
    layer.training = module.training
    for hooks in _HOOKS:
        layer.__dict__[hooks] = module.__dict__[hooks]
    return layer


def _warn_of_compute_dtype(selected: dict[str, nn.Module], config: KbitConfig) -> None:
    """fp32 products over a 16-bit model are slow and no more accurate than the codes: a mistake worth one line."""
    if config.compute_dtype is torch.float32 and any(m.weight.element_size() == 2 for m in selected.values()):  # type: ignore
        logger.warning(
            "compute_dtype is float32 but the model is in 16 bits: products will be slow; leave compute_dtype out to "
            "compute in the model's dtype"
        )


def is_conv1d_class(cls: type[nn.Module]) -> bool:
    return cls.__name__ == "Conv1D"


def _restored(module: QuantizedModule, weight: nn.Parameter) -> nn.Module:
    """The floating point module that `module` came from, holding `weight` as that class stores it."""
    cls = module.original_class
    restored: nn.Module
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            if is_conv1d_class(cls):
                restored = cls(module.out_features, module.in_features)
            else:
                restored = cls(module.in_features, module.out_features, module.bias is not None)
            restored.bias = module.bias
        else:
            assert isinstance(module, nn.Embedding)
            options = {"scale_grad_by_freq": module.scale_grad_by_freq, "sparse": module.sparse}
            restored = cls(module.num_embeddings, module.embedding_dim, module.padding_idx, **options)
    restored.weight = weight
    restored.training = module.training
    for hooks in _HOOKS:
        restored.__dict__[hooks] = module.__dict__[hooks]
    return restored


def _key(name: str) -> str:
    return f"{name}.weight" if name else "weight"


def _leaders(model: nn.Module, selected: dict[str, nn.Module]) -> dict[str, str]:
    """For every selected module that shares its weight: the first selected name of its group."""
    names = {module: name for name, module in selected.items()}
    leaders = {}
    for group in tied_groups(model):
        members = [names[module] for module in group if module in names]
        leaders.update({name: members[0] for name in members})
    return leaders


def _places(model: nn.Module) -> _Places:
    """Where each module hangs: id -> [(parent, attribute)]; a module that is used twice has two places."""
    places: _Places = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, attribute))
    return places


def _replace(model: nn.Module, places: _Places, old: nn.Module, new: nn.Module) -> nn.Module:
    """Hang `new` wherever `old` hung; returns the model, which is `new` if `old` was the whole of it."""
    if old is model:
        return new
    for parent, attribute in places[id(old)]:
        parent._modules[attribute] = new
    return model


def _switch_fused_paths(model: nn.Module) -> None:
    """Send torch's transformer encoders through their layers while these are quantized, and back afterwards.

    The fused eval path reads `linear1.weight` itself, and the encoder packs padded input into nested tensors for it.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            name, off = "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder):
            name, off = "use_nested_tensor", False
        else:
            continue
        saved = f"_kbit_{name}"
        quantized = any(isinstance(child, QuantizedModule) for child in module.modules())
        if quantized and saved not in module.__dict__:
            module.__dict__[saved] = getattr(module, name)
            setattr(module, name, off)
        elif not quantized and saved in module.__dict__:
            setattr(module, name, module.__dict__.pop(saved))


class ModelMemory(int):
    """Bytes of a model's tensors, each storage counted once; an int with a breakdown.

    quantized: codes and scales of quantized layers. other: every other Parameter. buffers: registered buffers.
    """

    quantized: int
    other: int
    buffers: int

    def __new__(cls, quantized: int, other: int, buffers: int) -> ModelMemory:
        total = super().__new__(cls, quantized + other + buffers)
        total.quantized, total.other, total.buffers = quantized, other, buffers
        return total

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]
        return self.quantized, self.other, self.buffers


def _second_copies(model: nn.Module) -> set[int]:
    """Storages of an offloaded output head that stand for those of the embedding which it is tied to."""
    pair = declared_tie(model)
    if len(pair) != 2 or pair[0] is pair[1]:
        return set()
    table, head = (dict(module.named_parameters(recurse=False)) for module in pair)
    return {
        p.untyped_storage()._cdata
        for name, p in head.items()
        if name in table
        and p is not table[name]
        and p.is_meta
        and (p.shape, p.dtype) == (table[name].shape, table[name].dtype)
    }


def model_memory(model: nn.Module) -> ModelMemory:
    """True bytes of a model: every storage once, however many names share it, scales included.

    Returns an int (the total) with the attributes `quantized`, `other` and `buffers`. Works on the meta device, and for
    weights that accelerate keeps on disk or in CPU memory.
    """
    seen = _second_copies(model)

    def count(tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
        return total

    codes = [part for m in model.modules() if isinstance(m, QuantizedModule) for part in m.parts().values()]
    quantized = count(codes)
    return ModelMemory(quantized, count(model.parameters()), count(model.buffers()))
