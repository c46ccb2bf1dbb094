"""bitsandbytes.functional for blocks: 4-bit (NF4, FP4) and 8-bit with a codebook. The mathematics is `kbit.ops`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kbit.checkpoint.bnb import STORAGE_DTYPES, as_bytes
from kbit.formats.blocks import TINY_ABSMAX, block_absmax, per_element
from kbit.formats.codebooks import codebook
from kbit.formats.spec import BLOCK_SIZES
from kbit.integrations.bitsandbytes.codes import get_4bit_type
from kbit.integrations.bitsandbytes.quant_state import QuantState
from kbit.ops import linear_4bit

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ops = torch.ops.kbit


# ---- 4-bit ----


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor of any shape and stride to NF4 or FP4.

    A: fp32, fp16 or bf16. absmax, out: optional tensors that receive the block scales and the codes.
    blocksize: 32 to 4096, 64 if None. compress_statistics: double quantization. quant_storage: dtype whose bytes hold
    the codes. Returns the packed codes `[bytes / itemsize, 1]` and their QuantState.

    Raises ValueError for another dtype, block size or type, and where the bytes do not fill the storage dtype.
    """
    blocksize = 64 if blocksize is None else blocksize
    _check_4bit(blocksize, quant_type, A.dtype, "quantization")
    if quant_storage not in STORAGE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE_DTYPES)
        raise ValueError(f"quant_storage must be one of {known}, got {quant_storage}")
    codes, scales = _ops.quantize_4bit(A, quant_type, blocksize)
    if codes.numel() % quant_storage.itemsize:
        raise ValueError(
            f"the codes of {list(A.shape)} take {codes.numel()} bytes, which {quant_storage} cannot hold; "
            "use quant_storage=torch.uint8 for this tensor"
        )
    packed = codes.view(quant_storage).unsqueeze(1)
    offset = state2 = None
    if compress_statistics:
        scales, nested_absmax, offset = _ops.quantize_absmax(scales)
        offset = offset.reshape(())
        code = codebook("dynamic8", A.device).clone()
        state2 = QuantState(nested_absmax, code=code, blocksize=256, dtype=torch.float32)
        state2._own_code = False
    if absmax is not None:
        scales = absmax.copy_(scales)
    state = QuantState(
        scales,
        shape=A.shape,
        code=get_4bit_type(quant_type, A.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=offset,
        state2=state2,
    )
    return (packed if out is None else out.copy_(packed.view_as(out))), state


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Decode packed 4-bit codes into the shape and dtype of `quant_state`.

    Without a quant_state, `absmax` and `out` say what to decode with and into. Codes passed as `[1, bytes]` (a
    transposed weight) give the transposed result. ValueError for what does not fit.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs a quant_state, or both absmax and out")
        size = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, shape=out.shape, dtype=out.dtype, blocksize=size, quant_type=quant_type)
    state = quant_state
    if state.shape is None or state.blocksize is None or state.quant_type is None or state.dtype is None:
        raise ValueError(
            "this quant_state does not belong to a 4-bit tensor: it lacks a shape, dtype, type or block size"
        )
    _check_4bit(state.blocksize, state.quant_type, state.dtype, "dequantization")
    packed = as_bytes(A)
    if packed.numel() != (math.prod(state.shape) + 1) // 2:
        raise ValueError(f"{packed.numel()} bytes of codes do not belong to a tensor of {list(state.shape)}")
    scales, nested_absmax, nested_offset = state.scales()
    result = _ops.dequantize_4bit(
        packed, scales, nested_absmax, nested_offset, state.quant_type, state.blocksize, list(state.shape), state.dtype
    )
    if out is not None:
        result = out.copy_(result)
    transposed = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1 and result.dim() == 2
    return result.t() if transposed else result


def _check_4bit(blocksize: int, quant_type: str, dtype: torch.dtype, what: str) -> None:
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCK_SIZES))}, got {blocksize}")
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if dtype not in _FLOATS:
        raise ValueError(f"4-bit {what} takes 16/32-bit floats, got {dtype}")


def quantize_fp4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):  # type: ignore[no-untyped-def]
    """`quantize_4bit` with FP4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):  # type: ignore[no-untyped-def]
    """`quantize_4bit` with NF4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_fp4(A, quant_state=None, absmax=None, out=None, blocksize=None):  # type: ignore[no-untyped-def]
    """`dequantize_4bit` with FP4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(A, quant_state=None, absmax=None, out=None, blocksize=None):  # type: ignore[no-untyped-def]
    """`dequantize_4bit` with NF4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def product_4bit(x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    """`x [..., K] @ W [N, K]^T + bias` from packed codes and their state."""
    n, k = state.shape  # type: ignore[misc]
    if x.shape[-1] != k:
        raise ValueError(f"the input has {x.shape[-1]} features, the 4-bit weight {[n, k]} takes {k}")
    codes = as_bytes(weight)
    if k % state.blocksize == 0:  # type: ignore[operator]
        codes = codes.view(n, k // 2)
    scales, nested_absmax, nested_offset = state.scales()
    return linear_4bit(
        x,
        codes,
        scales,
        nested_absmax,
        nested_offset,
        bias,
        state.quant_type,
        state.blocksize,
        n,  # type: ignore[arg-type]
    )


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """`A [..., K]` times a 4-bit weight; any number of rows. ValueError without the weight's state."""
    if state is None:
        raise ValueError("gemv_4bit needs the state that quantize_4bit returned")
    result = product_4bit(A, B, state, None)
    return result if out is None else out.copy_(result)


# ---- 8-bit with a codebook ----


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize to the nearest of up to 256 values of `code` (the signed dynamic map if None), block by block.

    A: fp32, fp16 or bf16, any shape. blocksize: any positive number of elements. nested: quantize the block scales
    too. Returns uint8 codes shaped like A and their QuantState. ValueError for another dtype or block size.
    """
    if blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {blocksize}")
    if A.dtype not in _FLOATS:
        raise ValueError(f"blockwise quantization takes 16/32-bit floats, got {A.dtype}")
    name = _dynamic_name(code, A.device)
    if name is not None and blocksize in BLOCK_SIZES:
        codes, scales = _ops.quantize_dynamic(A, name == "dynamic8", blocksize)
    else:
        codes, scales = _quantize_with(A, _table(code, name, A.device), blocksize)
    table = _table(code, name, A.device).clone()
    state = QuantState(scales, code=table, blocksize=blocksize, dtype=A.dtype)
    if nested:
        offset = scales.mean()
        nested_codes, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
        state = QuantState(nested_codes, code=table, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return (codes if out is None else out.copy_(codes)), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Decode uint8 codes: the codebook's value times the block's absmax, in the state's dtype (fp32 without one).

    A: uint8, any shape. Either quant_state, or absmax with code (the signed dynamic map if None) and blocksize.
    """
    if A.dtype != torch.uint8:
        raise ValueError(f"blockwise codes must be uint8, got {A.dtype}")
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise needs a quant_state or an absmax")
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    state = quant_state
    size, dtype = state.blocksize, state.dtype or torch.float32
    if size is None or size <= 0:
        raise ValueError(f"blocksize must be positive, got {size}")
    scales = state.absmax
    if state.state2 is not None:
        scales = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    if scales.numel() != -(-A.numel() // size):
        raise ValueError(
            f"{A.numel()} codes in blocks of {size} need {-(-A.numel() // size)} scales, got {scales.numel()}"
        )
    name = _dynamic_name(state.code, A.device)
    if name is not None and size in BLOCK_SIZES:
        result = _ops.dequantize_dynamic(A, scales.float(), name == "dynamic8", size, dtype)
    else:
        values = _table(state.code, name, A.device)[A.reshape(-1).int()]
        result = (values * per_element(scales.float(), size, A.numel())).to(dtype).view(A.shape)
    return result if out is None else out.copy_(result)


def _dynamic_name(code: Tensor | None, device: torch.device) -> str | None:
    """The name of `code` among kbit's own codebooks, or None."""
    if code is None:
        return "dynamic8"
    for name in ("dynamic8", "dynamic8-unsigned"):
        if code.numel() == 256 and torch.equal(code.to(device, torch.float32), codebook(name, device)):
            return name
    return None


def _table(code: Tensor | None, name: str | None, device: torch.device) -> Tensor:
    return codebook(name, device) if name is not None else code.to(device, torch.float32)  # type: ignore[union-attr]


def _quantize_with(x: Tensor, table: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes and scales under any table of at most 256 values: the nearest one; ties go to the lower value."""
    flat = x.detach().reshape(-1).float()
    scales = block_absmax(flat, blocksize)
    scaled = flat / per_element(scales.clamp(min=TINY_ABSMAX), blocksize, flat.numel())
    ordered, order = table.sort(stable=True)
    rank = torch.bucketize(scaled, (ordered[:-1] + ordered[1:]) / 2, out_int32=True)
    return order.to(torch.uint8)[rank].view(x.shape), scales
