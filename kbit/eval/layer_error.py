"""What quantizing does to each weight: relative squared error, layer by layer.

The loss of a language model grows close to linearly with this error (HIGGS, arXiv 2411.17525), so it shows where a
format hurts before any text is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kbit.config import KbitConfig
from kbit.nn.base import QuantizedModule
from kbit.nn.convert import is_conv1d_class, weight_of
from kbit.nn.experts import is_transposed
from kbit.nn.select import select_experts, select_modules
from kbit.ops import quantize

# Elements compared at once: the fp32 temporaries stay small whatever the size of the weight.
_CHUNK = 2**22


@dataclass(frozen=True)
class LayerError:
    """name: of the module. error: `|W - W'|^2 / |W|^2` (0 where W is all zeros and W' too). numel: elements of W."""

    name: str
    error: float
    numel: int


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """`|W - W'|^2 / |W|^2` of two tensors of one shape; differences in fp32, sums in fp64.

    Raises ValueError where the shapes differ. An all-zero W gives 0 for an all-zero W', else infinity.
    """
    if weight.shape != approximation.shape:
        raise ValueError(f"cannot compare {list(weight.shape)} with {list(approximation.shape)}")
    a, b = weight.detach().reshape(-1), approximation.detach().reshape(-1)
    difference = norm = 0.0
    for begin in range(0, a.numel(), _CHUNK):
        x = a[begin : begin + _CHUNK].float()
        y = b[begin : begin + _CHUNK].to(x.device).float()
        difference += float((x - y).double().square().sum())
        norm += float(x.double().square().sum())
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def layer_errors(model: nn.Module, config: KbitConfig) -> list[LayerError]:
    """The error that quantizing with `config` would cause in every module that it selects.

    model: in floating point; it is not changed. One weight at a time is quantized, decoded, compared and dropped, so
    the memory beyond the model is that of its largest weight. Raises ValueError, with its name, for a weight that
    cannot be quantized.
    """
    errors = []
    for name, module in select_modules(model, config).items():
        weight = weight_of(module)
        approximation = quantize(weight, config.weight_format, name=f"{name}.weight").dequantize(torch.float32)
        errors.append(LayerError(name, relative_error(weight, approximation), weight.numel()))
    for name, (experts, projection) in select_experts(model, config).items():
        weight = experts.get_parameter(projection).detach()
        weight = weight.transpose(1, 2) if is_transposed(experts) else weight
        approximation = quantize(weight, config.weight_format, name=name).dequantize(torch.float32)
        errors.append(LayerError(name, relative_error(weight, approximation), weight.numel()))
    return errors


def quantized_layer_errors(model: nn.Module, reference: Callable[[str], Tensor | None]) -> list[LayerError]:
    """The error of every quantized module of `model` against weights that `reference` reads one at a time.

    reference: from a key such as "model.layers.0.mlp.up_proj.weight" to the tensor that was quantized, as its class
    stores it (Conv1D: `[K, N]`), or None where it has none: such a module is left out.
    """
    errors = []
    for name, module in quantized_modules(model):
        weight = reference(f"{name}.weight")
        if weight is None:
            continue
        if is_conv1d_class(module.original_class):
            weight = weight.t()
        errors.append(LayerError(name, relative_error(weight, module.dequantize(torch.float32)), weight.numel()))
    return errors


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    """Every quantized module with its name; of tied ones, which share their codes, the first."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield name, module


def mean_error(errors: list[LayerError]) -> float:
    """The mean over layers, each weighted with its number of elements; NaN for an empty list."""
    total = sum(e.numel for e in errors)
    return sum(e.error * e.numel for e in errors) / total if total else float("nan")
