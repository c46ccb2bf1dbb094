"""`Linear4bit` and `Linear8bit`: nn.Linear with its weight in 4 or 8 bits."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from kbit import ops
from kbit.config import check_int8_settings
from kbit.formats.spec import Format
from kbit.nn.base import QuantizedModule


class _QuantizedLinear(QuantizedModule, nn.Linear):
    """Shared by both: construction, conversion from a linear layer, representation."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        fmt: Format,
        compute_dtype: torch.dtype | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.original_class = nn.Linear
        self._init_weight(fmt, (out_features, in_features), device, dtype)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=self.weight_dtype)) if bias else None
        )

    @classmethod
    def _copy_of(cls, linear: nn.Linear, name: str | None, **options: Any) -> Self:
        """A layer of this class with `options` that holds the quantized weight of `linear`, and its bias Parameter."""
        check_linear(cls, linear)
        where: dict[str, Any] = {"device": "meta", "dtype": linear.weight.dtype}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **options, **where)
        layer.quantize_from(linear.weight, name)
        layer.bias = linear.bias
        return layer

    def reset_parameters(self) -> None:
        """Nothing to draw: quantized weights come from a checkpoint or another layer."""

    def extra_repr(self) -> str:
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{size}, {self._format_repr()}{compute}"


def check_linear(cls: type, linear: nn.Module) -> None:
    """TypeError unless `cls.from_linear` can take the weight of `linear`: floating point, one row an out feature."""
    weight = getattr(linear, "weight", None)
    if not hasattr(linear, "in_features") or not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind, remedy = type(linear).__name__, ""
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            remedy = f" of {weight.dtype}; kbit.dequantize_model gives floating point layers back"
        raise TypeError(
            f"{cls.__name__}.from_linear takes a torch.nn.Linear with a floating point weight, got {kind}{remedy}"
        )


def check_features(x: Tensor, k: int) -> None:
    """ValueError unless `x` is `[..., k]`: packed codes of another K would decode to something."""
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"this layer takes input of {k} features in the last dimension, got shape {list(x.shape)}")


class Linear4bit(_QuantizedLinear):
    """`y = x W^T + b` with W in NF4 or FP4 ("QLoRA", arXiv 2305.14314).

    Parameters, all frozen but the bias, with N out features, K in features and B = ceil(N K / block_size) blocks:
    weight: uint8 `[N, K/2]`, or flat `[ceil(N K / 2)]` where K is not a multiple of the block size.
    absmax: the bits of fp32 scales as int32, or uint8 codes when double-quantized: `[N, K/block_size]`, or flat `[B]`.
    nested_absmax, nested_offset: int32 bits `[ceil(B / 256)]` and `[1]`; double quantization only.
    bias: `[N]` in `dtype`, as in nn.Linear.

    format: a Format, or a name such as "nf4" or "fp4-plain". compute_dtype: dtype of the product; None computes in the
    input's dtype. The output has the input's dtype. dtype: of the bias, and of what `dequantize()` returns.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: Format | str = "nf4",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        fmt = Format.parse(format) if isinstance(format, str) else format
        if not fmt.is_4bit:
            raise ValueError(f"Linear4bit stores nf4 or fp4, not {fmt.name}; use Linear8bit for int8")
        super().__init__(in_features, out_features, bias, fmt, compute_dtype, device, dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: Format | str = "nf4",
        compute_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> Linear4bit:
        """A quantized copy of `linear`; the bias Parameter is shared."""
        return cls._copy_of(linear, name, format=format, compute_dtype=compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., K]`, floating point -> `[..., N]` in x's dtype."""
        fmt = self.weight_format
        check_features(x, self.in_features)
        inner = x if self.compute_dtype is None else x.to(self.compute_dtype)
        out = ops.linear_4bit(
            inner,
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.bias,
            fmt.name,
            fmt.block_size,
            self.out_features,
        )
        return out if self.compute_dtype is None else out.to(x.dtype)


class Linear8bit(_QuantizedLinear):
    """`y = x W^T + b` with W in row-wise int8: LLM.int8() (arXiv 2208.07339).

    Parameters, frozen but the bias: weight int8 `[N, K]`, absmax int32 `[N]` (the bits of the fp32 row scales; a weight
    is `code * absmax / 127`), bias `[N]`.

    outlier_threshold: input features with a magnitude of at least this leave the int8 product and are multiplied in
    16 bits; 0 multiplies everything in int8.
    int8_activations: None quantizes the activations at many tokens only (`kbit.ops.choose`), where that is faster; at
    few the weight's bytes set the time, and activations that stay as they are give the better result. True quantizes
    them always, False never.
    compute_dtype, dtype: as in Linear4bit. Raises ValueError for other values of these settings.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        outlier_threshold: float = 6.0,
        int8_activations: bool | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int8_settings(outlier_threshold, int8_activations)
        super().__init__(in_features, out_features, bias, Format("int8", 0), compute_dtype, device, dtype)
        self.outlier_threshold = float(outlier_threshold)
        self.int8_activations = int8_activations

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        outlier_threshold: float = 6.0,
        compute_dtype: torch.dtype | None = None,
        name: str | None = None,
        int8_activations: bool | None = None,
    ) -> Linear8bit:
        """A quantized copy of `linear`; the bias Parameter is shared."""
        options = {"outlier_threshold": outlier_threshold, "int8_activations": int8_activations}
        return cls._copy_of(linear, name, **options, compute_dtype=compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., K]`, floating point -> `[..., N]` in x's dtype."""
        check_features(x, self.in_features)
        inner = x if self.compute_dtype is None else x.to(self.compute_dtype)
        out = ops.linear_8bit(inner, self.weight, self.absmax, self.bias, self.outlier_threshold, self.int8_activations)
        return out if self.compute_dtype is None else out.to(x.dtype)

    def extra_repr(self) -> str:
        asked = "" if self.int8_activations is None else f", int8_activations={self.int8_activations}"
        return f"{super().extra_repr()}, outlier_threshold={self.outlier_threshold:g}{asked}"
