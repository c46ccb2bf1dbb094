"""Models that were quantized in memory: make `save_pretrained` and `dequantize` know about it.

`kbit.quantize_model` works on any module tree and knows nothing of transformers. Once transformers is imported it
reports every model here, and a transformers model gets what `from_pretrained` would have given it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from kbit.config import KbitConfig as PlainConfig
from kbit.integrations.transformers import ties
from kbit.nn import convert


def install() -> None:
    """Have `quantize_model` and `dequantize_model` report here. Safe to call again."""
    # By name: after a reload of this module the function is another object that does the same.
    if attach.__name__ not in [known.__name__ for known in convert.on_quantized]:
        convert.on_quantized.append(attach)
    if detach.__name__ not in [known.__name__ for known in convert.on_dequantized]:
        convert.on_dequantized.append(detach)


def _is_pretrained(model: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def attach(model: Any, config: PlainConfig) -> None:
    """Give a quantized transformers model its quantizer, its config entry and the ties of its scales."""
    if not _is_pretrained(model):
        return
    from kbit.integrations.transformers.quantizer import quantizer_class

    quantizer = quantizer_class()(config, pre_quantized=True)
    quantizer.modules = ties.quantized_modules(model)
    quantizer.groups = ties.groups_of(model)
    ties.declare(model, quantizer.groups)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.quantization_method = quantizer.quantization_config.quant_method
    model.is_quantized = True
    for module in model.modules():
        if _is_pretrained(module):
            module.config._is_quantized = True
            quantizer.note_dtype(module.config, model.dtype)
    model._weight_conversions = []


def detach(model: Any) -> None:
    """Take away what `attach` or loading gave, from a model that is in floating point again."""
    if not _is_pretrained(model):
        return
    ties.undeclare(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.modules, quantizer.groups = {}, []
        quantizer.remove_quantization_config(model)
    for module in model.modules():
        if _is_pretrained(module):
            vars(module.config).pop("_is_quantized", None)
