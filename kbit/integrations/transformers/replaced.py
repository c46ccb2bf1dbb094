"""Layers that have changed since the model was quantized: floating point in the place of codes, tables of another size.

`modules_to_save` of PEFT leaves a trained floating point layer where a quantized one was, and a user may put one there
by hand. What is saved then has to say so, or loading would expect codes. Vocabularies grow and shrink through
`resize_token_embeddings`, which knows nothing of codes.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from kbit.integrations.transformers import ties
from kbit.nn.base import QuantizedModule
from kbit.nn.convert import dequantize_model, quantize_model
from kbit.nn.select import output_heads, select_modules

logger = logging.getLogger("kbit")


def skipped_modules(model: nn.Module, config: Any) -> list[str]:
    """`config.skip_modules` spelled out: without a list it is the output heads that are not quantized."""
    if config.skip_modules is not None:
        return list(config.skip_modules)
    heads = output_heads(model)
    return [name for name, m in model.named_modules() if m in heads and not isinstance(m, QuantizedModule)]


def note_floating_point(model: Any, config: Any) -> Any:
    """`config`, or a copy whose skip_modules also name what it would quantize but is floating point in `model`."""
    replaced = list(select_modules(model, config))
    heads = output_heads(model)
    table = getattr(model, "get_input_embeddings", lambda: None)()
    kinds = {isinstance(module, QuantizedModule) for module in (table, *heads) if module is not None}
    text = model.config.get_text_config()
    if len(kinds) > 1 and getattr(text, "tie_word_embeddings", False):
        logger.warning(
            "the output head and the embedding table no longer share a weight: one is quantized, the other is not. The "
            "config now says tie_word_embeddings=False"
        )
        text.tie_word_embeddings = False
        replaced += [name for name, m in model.named_modules() if m in heads and not isinstance(m, QuantizedModule)]
    if not replaced:
        return config
    config = copy.copy(config)
    known = skipped_modules(model, config)
    config.skip_modules = [*known, *(name for name in replaced if name not in known)]
    return config


def register() -> None:
    """Have `resize_token_embeddings` of transformers resize quantized tables too. Safe to call again."""
    from transformers import modeling_utils

    original = modeling_utils.PreTrainedModel.resize_token_embeddings
    if hasattr(original, "_kbit_wrapped"):
        return

    @functools.wraps(original)
    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _resize(original, self, *args, **kwargs)

    resize_token_embeddings._kbit_wrapped = True  # type: ignore[attr-defined]
    modeling_utils.PreTrainedModel.resize_token_embeddings = resize_token_embeddings


def _resize(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Dequantize the table and the head, resize, quantize again: with double quantization old rows move a little.

    Raises ValueError for offloaded tables.
    """
    pair = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if isinstance(m, QuantizedModule)]
    asks = any(
        value is not None for value in (*args[:2], kwargs.get("new_num_tokens"), kwargs.get("pad_to_multiple_of"))
    )
    if not pair or not asks:
        return original(model, *args, **kwargs)
    if any(part.is_meta for module in pair for part in module.parts().values()):
        raise ValueError("resize_token_embeddings: the quantized table is offloaded; load the model without offloading")
    quantizer = model.hf_quantizer
    config = note_floating_point(model, quantizer.quantization_config)
    ties.undeclare(model)
    float_of: dict[int, nn.Module] = {}
    for module in pair:
        new = dequantize_model(module)
        twin = next((float_of[id(m)] for m in pair if id(m) in float_of and m.weight is module.weight), None)
        if twin is not None:
            new.weight = twin.weight
        float_of[id(module)] = new
    for module in pair:
        for name, found in list(model.named_modules(remove_duplicate=False)):
            if found is module:
                model.set_submodule(name, float_of[id(module)])
    original(model, *args, **kwargs)
    quantize_model(model, config)
    return model.get_input_embeddings()
