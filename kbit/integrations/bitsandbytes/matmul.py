"""`bitsandbytes.matmul` and `matmul_4bit`: products with int8 and 4-bit weights, and the state of int8 layers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kbit.integrations.bitsandbytes.blockwise import dequantize_4bit, product_4bit
from kbit.integrations.bitsandbytes.identity import lives_in
from kbit.integrations.bitsandbytes.quant_state import QuantState
from kbit.ops import linear_8bit, switchback_linear

_ops = torch.ops.kbit


def fp16_for_codes(weight: Tensor) -> Tensor:
    """The weight that bitsandbytes takes int8 codes of: rounded to fp16, but for one that fp16 cannot hold."""
    half = weight.to(torch.float16)
    return half if weight.dtype == torch.float16 or bool(half.isfinite().all()) else weight


def trained_for_codes(weight: Tensor) -> Tensor:
    """The same for a weight that is quantized in every product: decided on the device, for no step may wait for it."""
    if weight.dtype == torch.float16:
        return weight
    half = weight.to(torch.float16)
    return torch.where(half.isfinite().all(), half.float(), weight.float())


@lives_in("bitsandbytes.autograd._functions")
class MatmulLtState:
    """What a Linear8bitLt keeps beside its weight.

    CB: int8 codes `[N, K]`. SCB: fp32 row absmax `[N]`. threshold: outlier threshold of the activations.
    has_fp16_weights: the weight is in floating point and is quantized anew in every product.
    The other fields exist because other libraries read or write them; they hold nothing here.
    """

    _old_layouts = frozenset({"CxB", "CxBt", "formatB", "_tile_indices"})

    def __init__(self) -> None:
        self.force_no_igemmlt = False
        self.CB: Tensor | None = None
        self.SB: Tensor | None = None
        self.SCB: Tensor | None = None
        self.SBt: Tensor | None = None
        self.CBt: Tensor | None = None
        self.subB: Tensor | None = None
        self.outlier_pool: Any = None
        self.has_accumulated_gradients = False
        self.threshold = 0.0
        self.idx: Tensor | None = None
        self.is_training = True
        self.has_fp16_weights = True
        self.use_pool = False

    def __getattr__(self, name: str) -> Any:
        if name in type(self)._old_layouts:
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def reset_grads(self) -> None:
        """Forget the codes: the next product takes them from the weight again."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None

    def moved(self, device: torch.device) -> None:
        """Have the codes and scales on `device`; their dtypes never change."""
        for name in ("CB", "SCB"):
            value = getattr(self, name)
            if value is not None and value.device != device:
                setattr(self, name, value.to(device))


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """LLM.int8(): `A [..., K] @ B [N, K]^T + bias` with int8 codes of B, in A's dtype.

    state: holds the codes once they exist; B is quantized into it when it has none, and, with has_fp16_weights, every
    time. threshold: columns of A with a magnitude of at least this are multiplied in A's dtype.
    Differentiable in A and bias, and in B where has_fp16_weights.
    """
    state = state if state is not None else MatmulLtState()
    if threshold > 0.0:
        state.threshold = threshold
    # A trained weight may have changed since its codes were taken, in ways that no version counter sees.
    stale = state.has_fp16_weights and B.is_floating_point()
    if state.CB is None or state.SCB is None or stale:
        state.reset_grads()
        if B.dtype == torch.int8:
            raise RuntimeError(
                "this int8 weight has lost its row scales (SCB): load it together with them, or quantize it again"
            )
        codes, scales = _ops.quantize_int8(trained_for_codes(B.detach()) if stale else fp16_for_codes(B.detach()))
        state.CB, state.SCB = codes, scales
    assert state.CB is not None and state.SCB is not None
    if A.shape[-1] != state.CB.shape[1]:
        raise ValueError(f"the input has {A.shape[-1]} features, the int8 weight {list(state.CB.shape)} takes others")
    if state.has_fp16_weights and torch.is_grad_enabled() and B.requires_grad:
        codes = (state.CB, state.SCB)
        result = switchback_linear(A, B, bias, float(state.threshold), int8_gradient=False, codes=codes)
    else:
        result = linear_8bit(A, state.CB, state.SCB, bias, float(state.threshold))
    return result if out is None else out.copy_(result)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`A [..., K] @ W [N, K]^T + bias` with W given as packed 4-bit codes (in either orientation) and their state.

    The result has A's dtype. Differentiable in A and bias; the codes travel through `save_for_backward`.
    ValueError without a state of a matrix.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit needs the quant_state of the weight")
    shape = quant_state.shape
    if shape is None or len(shape) != 2:
        raise ValueError(f"matmul_4bit multiplies with a matrix [N, K], but the weight is {shape}")
    if A.shape[-1] == shape[0] != shape[1]:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"matmul_4bit: the weight was quantized as [K, N] = {list(shape)}; quantize it as [N, K] (out features "
                "first), which is what a checkpoint holds",
                DeprecationWarning,
                stacklevel=2,
            )
        weight = dequantize_4bit(B.reshape(-1, 1), quant_state).to(A.dtype)
        result = torch.nn.functional.linear(A, weight.t(), bias)
    else:
        result = product_4bit(A, B, quant_state, bias)
    return result if out is None else out.copy_(result)
