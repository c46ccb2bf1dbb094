"""PEFT on quantized layers: LoRA in all its forms, with a merge that is right; and preparing a model for training.

PEFT wraps `Linear4bit` and the embeddings as the nn.Linear and nn.Embedding that they are, so forward and training work
by themselves. What reads or writes the base weight (merging, PiSSA, OLoRA and LoftQ initialisation, DoRA's norm) would
meet packed codes. PEFT has no public hook for third-party layers, so `register` wraps those few methods: each runs on
a floating point view of the base layer, and what it changed is quantized again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kbit.integrations import peft_experts
from kbit.nn.base import QuantizedModule, quantize_weight
from kbit.nn.convert import dequantize_model
from kbit.ops import quantize

_MARK = "_kbit_wrapped"


def register() -> None:
    """Wrap PEFT's methods once. Called when PEFT is imported."""
    from peft.tuners.lora import dora
    from peft.tuners.lora import layer as lora_layer
    from peft.tuners.trainable_tokens import layer as trainable_tokens
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import integrations, loftq_utils, other, quantization_utils

    for cls in (lora_layer.Linear, lora_layer.Embedding):
        _wrap(cls, "merge", _merge)
        _wrap(cls, "unmerge", _unmerge)
        _wrap(cls, "update_layer", _update_layer)
    _wrap(BaseTuner, "inject_adapter", peft_experts.inject_adapter)
    _wrap(lora_layer.ParamWrapper, "__init__", _refuse_packed_parameter)
    _wrap(dora.DoraEmbeddingLayer, "forward", _dora_embedding)
    _wrap(other.ModulesToSaveWrapper, "update", _train_a_float_copy)
    _wrap(trainable_tokens.TrainableTokensLayer, "update_layer", _refuse_tokens_of_a_quantized_table)
    _replace_everywhere(integrations, "dequantize_module_weight", _dequantize_module_weight)
    _replace_everywhere(quantization_utils, "resolve_quantization_backend", _resolve_quantization_backend)
    _replace_everywhere(loftq_utils, "loftq_init", _loftq_init)
    with contextlib.suppress(ImportError):  # made for transformers 5
        from peft.utils import transformers_weight_conversion as conversion

        _replace_everywhere(conversion, "convert_peft_config_for_transformers", peft_experts.convert_config)


def _wrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    """`cls.name` becomes `wrapper(original, self, ...)`."""
    original = getattr(cls, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(method, _MARK, True)
    setattr(cls, name, method)


def _replace_everywhere(module: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """A module function of PEFT becomes `wrapper(original, ...)`, also where other modules imported it by name."""
    original = getattr(module, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(function, _MARK, True)
    for holder_name, holder in list(sys.modules.items()):
        if holder_name.partition(".")[0] == "peft" and getattr(holder, name, None) is original:
            setattr(holder, name, function)


@contextlib.contextmanager
def float_base(layer: Any) -> Iterator[nn.Module]:
    """While the block runs, the innermost base layer of a PEFT layer is floating point: fp32 values of its weight.

    If the block changed the weight, the base layer is quantized from it in the end; otherwise its codes are untouched.
    """
    holder = layer
    while hasattr(holder.base_layer, "base_layer"):
        holder = holder.base_layer
    base: QuantizedModule = holder.base_layer
    before = base.dequantize().float()
    view: nn.Module
    if isinstance(base, nn.Linear):
        view = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        view.bias = base.bias
    else:
        view = nn.Embedding(*base.weight_shape, padding_idx=base.padding_idx, device="meta")  # type: ignore[arg-type, misc]
    view.weight = nn.Parameter(before.clone(), requires_grad=False)
    view.train(base.training)
    holder.base_layer = view
    try:
        yield view
        after = view.weight.detach()
        if not torch.equal(after, before):
            base.set_parts(quantize_weight(after, base.weight_format, "merged weight"))
    finally:
        holder.base_layer = base


def _merge(original: Callable[..., None], layer: Any, safe_merge: bool = False, adapter_names: Any = None) -> None:
    """Merge into the codes: quantize(dequantize(W) + BA), all adapters at once. The old codes are kept for unmerge."""
    base = layer.get_base_layer()
    if not isinstance(base, QuantizedModule):
        return original(layer, safe_merge=safe_merge, adapter_names=adapter_names)
    kept = dict(base.parts())
    with torch.no_grad(), float_base(layer):
        original(layer, safe_merge=safe_merge, adapter_names=adapter_names)
    if layer.merged and getattr(layer, "_kbit_unmerged", None) is None:
        layer._kbit_unmerged = kept


def _unmerge(original: Callable[..., None], layer: Any) -> None:
    """Back to the codes before the merge, to the bit."""
    base = layer.get_base_layer()
    kept = getattr(layer, "_kbit_unmerged", None)
    if not isinstance(base, QuantizedModule) or not layer.merged or kept is None:
        layer._kbit_unmerged = None
        return original(layer)
    device = base.weight.device  # type: ignore[union-attr]
    with torch.no_grad(), float_base(layer):
        original(layer)  # PEFT's bookkeeping: adapter list and bias; the weight it computes is replaced below
    base.set_parts({name: nn.Parameter(part.data.to(device), requires_grad=False) for name, part in kept.items()})
    layer._kbit_unmerged = None


def _update_layer(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    """Adapters whose start depends on the base weight (PiSSA, OLoRA, LoftQ ...) see its dequantized values."""
    base = layer.get_base_layer()
    config = kwargs.get("config")
    init = getattr(config, "init_lora_weights", None)
    if isinstance(base, QuantizedModule) and init == "loftq":
        raise ValueError(
            "LoftQ makes up for the error of quantizing, which an already quantized layer no longer knows. Load the "
            "model in floating point, wrap it with get_peft_model, then call kbit.quantize_model on the wrapped model."
        )
    if isinstance(base, QuantizedModule) and isinstance(init, str) and init not in ("gaussian", "eva"):
        with float_base(layer):
            original(layer, *args, **kwargs)
    else:
        original(layer, *args, **kwargs)
    if isinstance(base, QuantizedModule):
        _follow_dtype(layer, args[0] if args else kwargs["adapter_name"], base.cast_dtype or base.weight_dtype)


def _follow_dtype(layer: Any, adapter: str, dtype: torch.dtype) -> None:
    """Cast a new adapter to the dtype of the weight that was quantized, as PEFT does where the base is floating point.

    It cannot tell from packed codes, and fp32 adapters in a bf16 model cast every activation there and back. Whether
    half-precision adapters are then trained in fp32 is up to its `autocast_adapter_dtype`, as ever."""
    for name in layer.adapter_layer_names:
        adapters = getattr(layer, name, None)
        if not isinstance(adapters, nn.ModuleDict | nn.ParameterDict) or adapter not in adapters:
            continue
        if not any(p.is_meta for p in adapters.parameters()):
            adapters[adapter] = adapters[adapter].to(dtype=dtype)


def _refuse_packed_parameter(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    base = args[0] if args else kwargs["base_layer"]
    name = kwargs.get("parameter_name") or (args[2] if len(args) > 2 else None)
    inner = base
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    parameter = getattr(inner, name, None) if name else None
    if isinstance(parameter, Tensor) and not parameter.is_floating_point():
        raise ValueError(
            f"target_parameters names {name!r} of a {type(inner).__name__}, which holds {parameter.dtype} codes: "
            "LoRA on it would train without effect. Leave these modules out with skip_modules, or use target_modules."
        )
    original(layer, *args, **kwargs)


def _dora_embedding(original: Callable[..., Any], layer: Any, *args: Any, base_layer: Any, **kwargs: Any) -> Any:
    """DoRA (arXiv 2402.09353) divides by the norm of the whole table's columns, so it needs the table's values."""
    if isinstance(base_layer, QuantizedModule):
        base_layer = types.SimpleNamespace(weight=base_layer.dequantize())
    return original(layer, *args, base_layer=base_layer, **kwargs)


def _train_a_float_copy(
    original: Callable[..., None], wrapper: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """What `modules_to_save` names is trained whole: a floating point copy of a quantized module."""
    base = wrapper.original_module
    if adapter_name in wrapper.modules_to_save or not any(isinstance(m, QuantizedModule) for m in base.modules()):
        return original(wrapper, adapter_name, *args, **kwargs)
    wrapper.original_module = dequantize_model(copy.deepcopy(base))
    try:
        original(wrapper, adapter_name, *args, **kwargs)
    finally:
        wrapper.original_module = base.requires_grad_(False)


def _refuse_tokens_of_a_quantized_table(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    base = layer.get_base_layer()
    if isinstance(base, QuantizedModule):
        raise ValueError(
            f"trainable_token_indices needs a floating point table, but this one is a {type(base).__name__}: PEFT "
            "writes the trained rows into its weight. Quantize with quantize_embeddings=False, or name the table in "
            "modules_to_save, which trains all of it."
        )
    original(layer, *args, **kwargs)


@torch.no_grad()
def _loftq_init(
    original: Callable[..., Any], weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """LoftQ (arXiv 2310.08659): alternate quantizing `W - BA` and taking BA from the SVD of what that loses.

    PEFT's own version needs bitsandbytes and a GPU; this one takes kbit's NF4 (4 bits) or int8 (8 bits), on any device.
    Returns the dequantized weight in weight's dtype, A fp32 `[r, K]` and B fp32 `[N, r]`.
    """
    if num_bits not in (4, 8):
        raise ValueError(f"LoftQ starts from 4-bit (nf4) or 8-bit (int8) weights; loftq_bits is {num_bits}")
    if num_iter < 1:
        raise ValueError(f"loftq_iter must be at least 1, got {num_iter}")
    target = weight.detach().float()
    a = b = None
    for _ in range(num_iter):
        rest = target if a is None or b is None else target - b @ a
        base = quantize(rest, "nf4-plain" if num_bits == 4 else "int8").dequantize()
        u, sizes, vh = torch.linalg.svd(target - base, full_matrices=False)
        root = sizes[:reduced_rank].sqrt()
        a, b = root[:, None] * vh[:reduced_rank], u[:, :reduced_rank] * root
    assert a is not None and b is not None
    return base.to(weight.dtype), a.contiguous(), b.contiguous()


def _dequantize_module_weight(original: Callable[..., Any], module: nn.Module) -> Any:
    return module.dequantize() if isinstance(module, QuantizedModule) else original(module)


def _resolve_quantization_backend(original: Callable[..., Any], base_layer: nn.Module, **kwargs: Any) -> Any:
    if not isinstance(base_layer, QuantizedModule):
        return original(base_layer, **kwargs)
    from peft.utils.quantization_utils import QuantizationBackend

    class KbitBackend(QuantizationBackend):
        """How PEFT's other tuners (OFT, VeRA, MiSS ...) read and write a quantized base weight."""

        layer_type = "linear" if isinstance(base_layer, nn.Linear) else "embedding"
        supports_merge = True
        backend_name = "kbit"

        def get_base_weight(self, base_layer: Any) -> Tensor:
            return base_layer.dequantize()

        def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
            base = peft_layer.get_base_layer()
            base.set_parts(quantize_weight(weight_data, base.weight_format, "merged weight"))

    return KbitBackend()


def prepare_for_training(
    model: nn.Module, gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """Make a quantized model ready for adapters (QLoRA, arXiv 2305.14314), in place; returns it.

    Freezes every Parameter and, with `gradient_checkpointing` (for models that support it), recomputes activations in
    the backward pass instead of keeping them. Nothing is cast: frozen norms and heads keep their dtype, since the
    gradient through them does not depend on it, and no fp32 copy of the head is made. Add adapters afterwards, for
    example with `peft.get_peft_model`.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        # Without re-entry, checkpointed blocks pass gradients to adapters even though their input needs none.
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
        if options["use_reentrant"] and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
        config = getattr(model, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = False  # a cache would be filled twice, once a pass
    return model


def merge_adapters(model: nn.Module, dequantize: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
    """Merge the active adapters of a PEFT model into its base; returns the base model without adapters.

    dequantize: True gives a floating point model: dequantize(W) + BA, computed in fp32 and rounded once to `dtype` (the
        dtype that was quantized unless given). False keeps the model quantized: quantize(dequantize(W) + BA), smaller,
        with a second quantization error.
    """
    if not hasattr(model, "merge_and_unload"):
        raise TypeError(f"merge_adapters needs a PEFT model, got {type(model).__name__}")
    if not dequantize:
        return model.merge_and_unload()  # type: ignore[operator]
    for layer in list(model.modules()):
        base = getattr(layer, "base_layer", None)
        if isinstance(base, QuantizedModule) and hasattr(layer, "merge"):
            wanted = dtype or base.weight_dtype
            layer.base_layer = dequantize_model(base, torch.float32)  # one layer at a time is in fp32
            layer.merge()  # type: ignore[operator]
            layer.base_layer.weight.data = layer.base_layer.weight.data.to(wanted)  # type: ignore[union-attr]
        elif isinstance(base, nn.Module) and hasattr(layer, "merge"):
            layer.merge()  # type: ignore[operator]  # a head that stayed in floating point has its adapter too
    return dequantize_model(model.unload(), dtype)  # type: ignore[operator]
