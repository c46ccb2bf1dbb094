"""Fused experts: one projection of all experts of a mixture-of-experts layer, `W [E, N, K]`, in 4 or 8 bits.

transformers 5 keeps the experts of a layer as 3-D Parameters (`gate_up_proj`, `down_proj`). `ExpertWeight` takes the
place of such a Parameter, under its name, and multiplies tokens that are sorted by expert. `experts_forward` is the
forward of the whole experts module over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kbit import ops
from kbit.formats.spec import Format
from kbit.nn.base import QuantizedModule
from kbit.nn.select import is_llama4_experts

IMPLEMENTATION = "kbit"  # the name of `experts_forward` in transformers' registry of experts implementations


class ExpertWeight(QuantizedModule):
    """One projection of E experts. Parameters as in Linear4bit or Linear8bit, with a leading dimension of E.

    format: nf4, fp4 or int8. transposed: the model stores `[E, K, N]` (gpt-oss); blocks run along K either way.
    outlier_threshold: what the model was quantized with. It has no effect here: an expert sees few tokens, so int8
    experts read their weights in 8 bits and never quantize activations. compute_dtype, dtype: as in Linear4bit.
    """

    def __init__(
        self,
        experts: int,
        out_features: int,
        in_features: int,
        *,
        format: Format,
        transposed: bool = False,
        outlier_threshold: float = 6.0,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.outlier_threshold = float(outlier_threshold)
        self.compute_dtype = compute_dtype
        self.original_class = nn.Parameter  # type: ignore[assignment]
        self._init_weight(format, (experts, out_features, in_features), device, dtype)  # type: ignore[arg-type]

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: `[S, K]`, rows sorted by expert; offsets: int32 `[E]`, where each expert's rows end; bias: `[E, N]` ->
        `[S, N]` in x's dtype; rows beyond the last expert's give 0."""
        fmt = self.weight_format
        inner = x if self.compute_dtype is None else x.to(self.compute_dtype)
        if fmt.name == "int8":
            out = ops.experts_8bit(inner, offsets, self.weight, self.absmax, bias)
        else:
            scales = (self.absmax, self.nested_absmax, self.nested_offset)
            n = self.weight_shape[1]
            out = ops.experts_4bit(inner, offsets, self.weight, *scales, bias, fmt.name, fmt.block_size, n)
        return out if self.compute_dtype is None else out.to(x.dtype)

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight as the model stores it: `[E, N, K]`, or `[E, K, N]` where transposed."""
        experts, n, k = self.weight_shape
        return torch.Size((experts, k, n)) if self.transposed else self.weight_shape

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`torch.bmm(x [E, M, K], weight)`, which Llama 4 calls, as a product by experts."""
        if func is torch.bmm and len(args) == 2 and isinstance(args[1], cls) and args[1].transposed:
            x, weight = args
            experts, rows, k = x.shape
            offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=x.device) * rows
            out: Tensor = weight(x.reshape(-1, k), offsets)
            return out.view(experts, rows, -1)
        return NotImplemented

    def restored(self, dtype: torch.dtype | None = None) -> Tensor:
        """The floating point weight as the model stores it: `[E, N, K]`, or `[E, K, N]` where transposed."""
        weight = self.dequantize(dtype)
        return weight.transpose(1, 2).contiguous() if self.transposed else weight

    def extra_repr(self) -> str:
        experts, n, k = self.weight_shape
        return f"experts={experts}, in_features={k}, out_features={n}, {self._format_repr()}"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of a fused experts module whose projections are `ExpertWeight`s.

    Nothing here waits for the device: the routing stays there, so that a decoding step captures in a CUDA graph.
    hidden_states: `[T, H]`. top_k_index, top_k_weights: `[T, k]`, the experts of each token and their weights; an index
    beyond the last expert (expert parallelism) contributes nothing. Returns `[T, H]` in hidden_states' dtype.
    """
    tokens, k = top_k_index.shape
    first = self.gate_up_proj if self.has_gate else self.up_proj
    expert_of_row, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(first.weight_shape[0], device=order.device, dtype=expert_of_row.dtype)
    offsets = torch.searchsorted(expert_of_row, numbers, right=True, out_int32=True)
    x = hidden_states[order // k]

    name = "gate_up_proj" if self.has_gate else "up_proj"
    inner = first(x, offsets, getattr(self, f"{name}_bias") if self.has_bias else None)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    out = self.down_proj(inner, offsets, self.down_proj_bias if self.has_bias else None)
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    # Back to the order of tokens, then one sum over a token's experts: unlike adding rows up by index, which is atomic
    # on a GPU, it repeats bit for bit.
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=order.device))
    wide = torch.promote_types(out.dtype, torch.float32)
    out = out[row_of].view(tokens, k, -1) * top_k_weights.to(wide).unsqueeze(-1)
    return out.sum(dim=1).to(hidden_states.dtype)


def expert_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """`(E, N, K)` of the projection `name` of a fused experts module, however the model stores it."""
    parameter = module._parameters[name]
    assert parameter is not None
    experts, a, b = parameter.shape
    return (experts, b, a) if is_transposed(module) else (experts, a, b)


def is_transposed(module: nn.Module) -> bool:
    """Whether a fused experts module stores its weights `[E, K, N]`."""
    return bool(getattr(module, "is_transposed", is_llama4_experts(module)))


def empty_expert_weight(module: nn.Module, name: str, config: Any, device: torch.device | str) -> ExpertWeight:
    """What replaces the Parameter `name` of a fused experts module; it holds no weight yet."""
    parameter = module._parameters[name]
    assert parameter is not None
    experts, n, k = expert_shape(module, name)
    layer = ExpertWeight(
        experts,
        n,
        k,
        format=config.weight_format,
        transposed=is_transposed(module),
        outlier_threshold=config.outlier_threshold,
        compute_dtype=config.compute_dtype,
        device=device,
        dtype=parameter.dtype,
    )
    layer.weight_requires_grad = parameter.requires_grad
    layer.training = module.training
    return layer


def install(module: nn.Module, name: str, layer: ExpertWeight) -> None:
    """Put `layer` where the Parameter `name` was, and send the module's forward through `experts_forward`."""
    del module._parameters[name]
    module._modules[name] = layer
    config: Any = getattr(module, "config", None)
    if config is not None and config._experts_implementation != IMPLEMENTATION:
        module._kbit_experts_before = config._experts_implementation  # type: ignore[assignment]
        config._experts_implementation_internal = IMPLEMENTATION


def uninstall(module: nn.Module, name: str, dtype: torch.dtype | None) -> None:
    """The Parameter `name` again, from its dequantized weight."""
    layer = module._modules.pop(name)
    assert isinstance(layer, ExpertWeight)
    weight = layer.restored(dtype or layer.cast_dtype)
    module.register_parameter(name, nn.Parameter(weight, requires_grad=layer.weight_requires_grad))
    config: Any = getattr(module, "config", None)
    if (
        config is not None
        and config._experts_implementation == IMPLEMENTATION
        and not any(isinstance(child, ExpertWeight) for child in module.children())
    ):
        config._experts_implementation_internal = getattr(module, "_kbit_experts_before", None) or "eager"
