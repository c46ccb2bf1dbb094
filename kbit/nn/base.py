"""What the quantized layers share: frozen integer Parameters that no cast, move or save can change.

Codes and scales are integer tensors (fp32 scales as their bits in int32), so `.half()`, mixed-precision policies and
checkpoint loaders leave them alone, and FSDP2, safetensors, accelerate and `torch.compile` treat them as any Parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kbit.formats.packing import layout_shapes
from kbit.formats.spec import NESTED_BLOCK_SIZE, Format
from kbit.formats.tensor import QuantizedTensor
from kbit.ops import dequantize, quantize

# Parameters of a quantized weight, in the order in which they are registered. "weight" holds the codes.
PART_NAMES = ("weight", "absmax", "nested_absmax", "nested_offset")


def part_shapes(fmt: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each Parameter that stores a weight of `shape` in `fmt`."""
    codes, scales = layout_shapes(fmt, shape)
    parts = {"weight": (codes, torch.uint8 if fmt.is_4bit else torch.int8)}
    if not fmt.double_quant:
        return {**parts, "absmax": (scales, torch.int32)}
    nested = -(-fmt.block_count(shape) // NESTED_BLOCK_SIZE)
    return {
        **parts,
        "absmax": (scales, torch.uint8),
        "nested_absmax": ((nested,), torch.int32),
        "nested_offset": ((1,), torch.int32),
    }


def to_parts(q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of `q` as modules hold them: under their Parameter names, fp32 scales as int32 bits."""
    parts = {"weight" if name == "codes" else name: tensor for name, tensor in q.tensors().items()}
    return {name: t.view(torch.int32) if t.dtype == torch.float32 else t for name, t in parts.items()}


def quantize_weight(weight: Tensor, fmt: Format, name: str | None = None) -> dict[str, Tensor]:
    """Quantize one weight `[N, K]` into the parts of a quantized layer. `name` is what errors call it."""
    return to_parts(quantize(weight, fmt, name=name))


def _bitsandbytes_format(state_dict: Mapping[str, Any], prefix: str) -> str | None:
    """The format that bitsandbytes' keys beside a weight name, None where there are none."""
    if f"{prefix}SCB" in state_dict:
        return "int8"
    for name in ("nf4", "fp4"):
        if f"{prefix}weight.quant_state.bitsandbytes__{name}" in state_dict:
            return name
    return None


class QuantizedModule(nn.Module):
    """A module whose weight is stored in a `Format`; the base of the quantized layers."""

    weight: Tensor
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None
    weight_format: Format
    weight_shape: torch.Size
    weight_dtype: torch.dtype
    # What `.half()`, `.to(dtype)` ... would have made of a floating point weight; None while nothing was cast.
    cast_dtype: torch.dtype | None = None
    # nn.Linear or nn.Embedding, or a class such as transformers' Conv1D: what `dequantize_model` restores.
    original_class: type[nn.Module]
    # Whether the weight took part in training before it was quantized: restored by `dequantize_model`.
    weight_requires_grad: bool = True

    def _init_weight(
        self, fmt: Format, shape: tuple[int, int], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self.weight_format = fmt
        self.weight_shape = torch.Size(shape)
        self.weight_dtype = dtype or torch.get_default_dtype()
        for name in PART_NAMES:
            self.register_parameter(name, None)
        for name, (part_shape, part_dtype) in part_shapes(fmt, shape).items():
            # All zeros decode to zeros in every format: a new layer is a valid one.
            part = torch.zeros(part_shape, dtype=part_dtype, device=device)
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        """Moves reach codes and scales, casts never do (`.type(dtype)` would); a cast is remembered in `cast_dtype`."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or tensor.is_floating_point():
                return moved
            return tensor.to(moved.device)

        super()._apply(move, recurse)
        current = self.cast_dtype or self.weight_dtype
        cast = fn(torch.empty(0, dtype=current, device="cpu")).dtype
        if cast != current:
            self.cast_dtype = cast
        return self

    def parts(self) -> dict[str, nn.Parameter]:
        """The Parameters that store the weight, by name."""
        return {name: part for name in PART_NAMES if (part := self._parameters[name]) is not None}

    def set_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Take over the parts of a weight; Parameters are shared, tensors wrapped. ValueError where they do not fit."""
        expected = part_shapes(self.weight_format, tuple(self.weight_shape))
        if set(parts) != set(expected):
            label = self.weight_format.label
            names = ", ".join(expected), ", ".join(sorted(parts)) or "none"
            raise ValueError(f"a {label} weight has the parts {names[0]}; got {names[1]}")
        for name, part in parts.items():
            shape, dtype = expected[name]
            if tuple(part.shape) != shape or part.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}")
            self._parameters[name] = (
                part if isinstance(part, nn.Parameter) else nn.Parameter(part.detach(), requires_grad=False)
            )

    def quantize_from(self, weight: Tensor, name: str | None = None) -> None:
        """Quantize `weight`, in the logical shape `weight_shape`, into this module; `name` is what errors call it.

        Raises ValueError for another shape, and for NaN or infinity.
        """
        if weight.shape != self.weight_shape:
            raise ValueError(f"this layer stores a weight {list(self.weight_shape)}, got {list(weight.shape)}")
        self.set_parts(quantize_weight(weight, self.weight_format, name))
        self.weight_dtype, self.cast_dtype = weight.dtype, None

    def quantized_weight(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares this module's storage."""
        parts = {name: part.detach() for name, part in self.parts().items()}
        parts = {name: t.view(torch.float32) if t.dtype == torch.int32 else t for name, t in parts.items()}
        return QuantizedTensor(
            parts.pop("weight"), shape=self.weight_shape, dtype=self.weight_dtype, format=self.weight_format, **parts
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in floating point: shape and dtype of what was quantized, unless another dtype is given."""
        return dequantize(self.quantized_weight(), dtype)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the weight, scales included."""
        return sum(part.nbytes for part in self.parts().values())

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Refuse what torch would cast or misread in silence: another dtype, or codes of another format."""
        foreign = _bitsandbytes_format(state_dict, prefix)
        if foreign is not None:
            error_msgs.append(
                f"{prefix}weight is in bitsandbytes' layout ({foreign}), this layer is {self.weight_format.label} in "
                "kbit's own: from_pretrained(..., quantization_config=KbitConfig(...)) reads such a checkpoint"
            )
            return
        saved_format = local_metadata.get("kbit_format")
        if saved_format is not None and saved_format != self.weight_format.label:
            error_msgs.append(f"{prefix}weight was saved as {saved_format}, this layer is {self.weight_format.label}")
            return
        for name, part in self.parts().items():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype != part.dtype:
                error_msgs.append(
                    f"{prefix + name} has dtype {value.dtype} in the state dict, but this {self.weight_format.label} "
                    f"layer stores {part.dtype}: quantize the model that wrote it, or load before quantizing"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and prefix[:-1] in metadata:
            metadata[prefix[:-1]]["kbit_format"] = self.weight_format.label

    def _format_repr(self) -> str:
        fmt = self.weight_format
        return fmt.label if fmt.name == "int8" else f"{fmt.label}, block_size={fmt.block_size}"
