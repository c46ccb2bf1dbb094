"""Exact bytes of a model's weights in each format, from its skeleton: what `kbit.quantize_model` would make of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from kbit.config import KbitConfig
from kbit.nn.convert import model_memory, weight_of
from kbit.nn.experts import expert_shape
from kbit.nn.select import is_linear, output_heads, select_experts, select_modules

# In the order of quality; "bf16" is the model as it is loaded, unquantized.
FORMATS = ("bf16", "int8", "nf4-plain", "nf4", "fp4-plain", "fp4")


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """Bytes of a model's weights in one format.

    quantized: codes and all scales of the quantized layers. other: what stays in floating point (embeddings, output
    head, norms, biases). buffers: registered buffers. replaced: bytes that the quantized layers' weights took before.
    largest: bytes of the largest of those, all experts of a projection as one: products of many tokens and
    gradients may decode a whole weight to 16 bits (which ones do depends on the device, see `kbit.ops.choose`).
    """

    format: str
    quantized: int
    other: int
    buffers: int
    replaced: int
    largest: int
    modules: int

    @property
    def total(self) -> int:
        return self.quantized + self.other + self.buffers

    @property
    def ratio(self) -> float:
        """Quantized layers now over before; 1 where nothing is quantized."""
        return self.quantized / self.replaced if self.replaced else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "total": self.total}


def plan_weights(model: nn.Module, config: KbitConfig | str | None) -> WeightPlan:
    """Bytes of `model`, which may be on the meta device, once quantized.

    config: a KbitConfig, a format name such as "nf4-plain", or None or "bf16" for the model as it is. The modules are
    those that `kbit.quantize_model` selects; tied weights count once.
    """
    memory = model_memory(model)
    if config is None or config == "bf16":
        return WeightPlan("bf16", 0, memory.quantized + memory.other, memory.buffers, 0, 0, 0)
    if isinstance(config, str):
        config = KbitConfig.from_format(config)
    fmt = config.weight_format
    selected = select_modules(model, config)
    seen: set[int] = set()
    quantized = replaced = largest = 0
    for module in selected.values():
        parameter = module._parameters["weight"]
        # A tied weight on the meta device is one Parameter under two names.
        if parameter is None or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        weight = weight_of(module) if is_linear(module) else parameter
        quantized += fmt.nbytes(weight.shape)
        replaced += weight.nbytes
        largest = max(largest, weight.nbytes)
    fused = select_experts(model, config)
    for experts, name in fused.values():
        nbytes = experts.get_parameter(name).nbytes
        quantized += fmt.nbytes(expert_shape(experts, name))
        replaced += nbytes
        largest = max(largest, nbytes)
    other = memory.other - replaced
    modules = len(selected) + len(fused)
    return WeightPlan(fmt.label, memory.quantized + quantized, other, memory.buffers, replaced, largest, modules)


def linear_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """`(N, K)` of every linear layer but the output head: what PEFT's "all-linear" puts LoRA adapters onto."""
    heads = output_heads(model)
    linears = [module for module in model.modules() if is_linear(module) and module not in heads]
    return [(n, k) for n, k in (weight_of(module).shape for module in linears)]


def parameter_sizes(model: nn.Module) -> list[int]:
    """Elements of every floating point Parameter, a tied one once."""
    return [math.prod(p.shape) for p in model.parameters() if p.is_floating_point()]
