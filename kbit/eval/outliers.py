"""Outlier features, put into a model on purpose without changing what it computes.

Large language models grow a few hidden features that are tens of times larger than the others ("LLM.int8()",
arXiv 2208.07339). A product that quantizes activations row by row loses everything else beside them. Small models
have none, so this file gives them some: a channel of a norm's output is scaled up by a power of two, and the matching
column of every linear layer that reads it down by the same. Multiplying by a power of two is exact in binary floating
point, so the function stays the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kbit.nn.base import QuantizedModule

# norm attribute of a decoder layer -> what reads its output, as (submodule, linear layers).
_READERS = {
    "input_layernorm": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "post_attention_layernorm": ("mlp", ("gate_proj", "up_proj")),
}


def scale_channels(norm: nn.Module, readers: list[nn.Linear], channels: Tensor, exponent: int) -> None:
    """Multiply the `channels` of a norm's output by `2 ** exponent` and undo it in the linear layers that read it.

    norm: anything whose output is proportional to its `weight [K]` (RMSNorm, LayerNorm). readers: every nn.Linear that
    reads that output, weight `[N, K]`. channels: int64 indices. In place.

    Raises ValueError, with nothing changed, where the result would not be exact: a norm whose output is not
    proportional to its weight (Gemma adds one to it), or a value that would overflow or lose bits.
    """
    scale = 2.0**exponent
    norm_weight: Tensor = norm.weight  # type: ignore[assignment]
    up = [norm_weight.detach()[channels] * scale]
    bias = getattr(norm, "bias", None)
    if bias is not None:
        up.append(bias.detach()[channels] * scale)
    down = []
    for reader in readers:
        if isinstance(reader, QuantizedModule):
            raise ValueError("outlier features go into a model before it is quantized")
        down.append(reader.weight.detach()[:, channels] * (1.0 / scale))
    undone = [u * (1.0 / scale) for u in up] + [d * scale for d in down]
    before = [norm_weight[channels]] + ([bias[channels]] if bias is not None else [])
    before += [reader.weight[:, channels] for reader in readers]
    if not all(torch.equal(a, b) for a, b in zip(undone, before, strict=True)):
        raise ValueError(
            f"scaling by 2**{exponent} is not exact in {norm_weight.dtype}; use a smaller exponent or bfloat16"
        )
    _check_proportional(norm)
    with torch.no_grad():
        norm_weight[channels] = up[0]
        if bias is not None:
            bias[channels] = up[1]
        for reader, columns in zip(readers, down, strict=True):
            reader.weight[:, channels] = columns


def inject_outliers(model: nn.Module, count: int = 1, exponent: int = 6) -> dict[str, list[int]]:
    """Give every decoder layer of a Llama-like model outlier features, in place and exactly.

    model: a floating point transformers model with `model.layers[i]` that hold `input_layernorm` before q/k/v_proj and
        `post_attention_layernorm` before gate/up_proj (Llama, Mistral, Qwen2 and their like).
    count: channels a norm; those with the largest weight are taken, as training does it.
    exponent: the channels grow by `2 ** exponent`.

    Returns the channels by the name of their norm. Raises ValueError for another architecture, a quantized model, or
    where the scaling would not be exact.
    """
    chosen: dict[str, list[int]] = {}
    plan = []
    for name, layer in model.named_modules():
        for norm_name, (block_name, reader_names) in _READERS.items():
            norm, block = getattr(layer, norm_name, None), getattr(layer, block_name, None)
            readers: list[Any] = [getattr(block, reader, None) for reader in reader_names]
            if norm is None or not all(isinstance(reader, nn.Linear) for reader in readers):
                continue
            channels = norm.weight.detach().abs().float().topk(count).indices.sort().values
            plan.append((norm, readers, channels))
            chosen[f"{name}.{norm_name}" if name else norm_name] = channels.tolist()
    if not plan:
        raise ValueError(f"{type(model).__name__} has no Llama-like decoder layers to give outlier features to")
    for norm, readers, channels in plan:
        scale_channels(norm, readers, channels, exponent)
    return chosen


def _check_proportional(norm: nn.Module) -> None:
    """ValueError unless doubling the norm's parameters doubles its output, bit for bit, on a probe."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    probe = torch.linspace(-1.0, 1.0, weight.numel(), dtype=torch.float32).to(weight.device, weight.dtype)[None]
    saved = {name: p.detach().clone() for name, p in norm.named_parameters(recurse=False)}
    with torch.no_grad():
        once = norm(probe)
        try:
            for p in norm.parameters(recurse=False):
                p.mul_(2.0)
            twice = norm(probe)
        finally:
            for name, p in norm.named_parameters(recurse=False):
                p.copy_(saved[name])
    if not torch.equal(twice, once * 2.0):
        raise ValueError(f"the output of {type(norm).__name__} is not proportional to its weight: scaling is not exact")
