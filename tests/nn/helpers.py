from __future__ import annotations

import torch
from torch import Tensor, nn

import kbit
from kbit.formats import Format
from kbit.nn.base import QuantizedModule

LABELS = ("nf4", "nf4-plain", "fp4", "fp4-plain", "int8")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear(
    label: str, n: int = 8, k: int = 64, bias: bool = True, dtype: torch.dtype = torch.float32
) -> QuantizedModule:
    source = nn.Linear(k, n, bias, dtype=dtype)
    if label == "int8":
        return kbit.Linear8bit.from_linear(source)
    return kbit.Linear4bit.from_linear(source, label)


def embedding(label: str, rows: int = 12, dim: int = 64, dtype: torch.dtype = torch.float32) -> QuantizedModule:
    source = nn.Embedding(rows, dim, padding_idx=0, dtype=dtype)
    if label == "int8":
        return kbit.Embedding8bit.from_embedding(source)
    return kbit.Embedding4bit.from_embedding(source, label)


def empty_linear(label: str, n: int = 8, k: int = 64, **kwargs) -> QuantizedModule:
    if label == "int8":
        return kbit.Linear8bit(k, n, **kwargs)
    return kbit.Linear4bit(k, n, format=label, **kwargs)


def bits_of(module: nn.Module) -> dict[str, bytes]:
    """Every tensor of a module's state, as dtype, shape and bytes."""

    def data(t: Tensor) -> bytes:
        return f"{t.dtype}{list(t.shape)}".encode() + t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return {name: data(t) for name, t in module.state_dict().items()}


def codes_of(module: nn.Module) -> dict[str, bytes]:
    """The same of codes and scales alone: what no cast may touch."""
    integers = {name for name, t in module.state_dict().items() if not t.is_floating_point()}
    return {name: data for name, data in bits_of(module).items() if name in integers}


def reference(layer: QuantizedModule) -> nn.Linear:
    """The nn.Linear that a quantized layer stands for."""
    assert isinstance(layer, nn.Linear)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight_dtype)
    plain.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain


def config(label: str, **kwargs) -> kbit.KbitConfig:
    return kbit.KbitConfig.from_format(label, **kwargs)


def fmt(label: str) -> Format:
    return Format.parse(label)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
