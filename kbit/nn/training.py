"""`SwitchBackLinear`: a linear layer that trains its floating point weight with products in int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kbit import ops
from kbit.config import check_int8_settings
from kbit.nn.linear import check_features, check_linear


class SwitchBackLinear(nn.Linear):
    """`y = x W^T + b` with W in floating point, multiplied in int8 (SwitchBack, arXiv 2304.13013).

    Every forward quantizes the weight and the activations row by row; the gradient to the weight is a 16-bit product.
    int8_gradient: the gradient to the input is an int8 product too, else one with the dequantized weight.
    outlier_threshold: as in Linear8bit; 0, as in the paper, multiplies everything in int8.
    Parameters and state dict are those of nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        outlier_threshold: float = 0.0,
        int8_gradient: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int8_settings(outlier_threshold, None)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.outlier_threshold = float(outlier_threshold)
        self.int8_gradient = int8_gradient

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, outlier_threshold: float = 0.0, int8_gradient: bool = True
    ) -> SwitchBackLinear:
        """A layer that shares the Parameters of `linear`. Raises TypeError where these are not floating point."""
        check_linear(cls, linear)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            outlier_threshold=outlier_threshold,
            int8_gradient=int8_gradient,
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., K]`, floating point -> `[..., N]` in x's dtype."""
        check_features(x, self.in_features)
        return ops.switchback_linear(x, self.weight, self.bias, self.outlier_threshold, self.int8_gradient)

    def extra_repr(self) -> str:
        extra = f"outlier_threshold={self.outlier_threshold:g}, int8_gradient={self.int8_gradient}"
        return f"{super().extra_repr()}, {extra}"
