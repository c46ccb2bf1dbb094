"""Every operator in plain torch, on any device: what runs where no kernel does, and the oracle of those that do."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kbit.formats import blocks, double
from kbit.formats.codebooks import codebook as codebook_table
from kbit.formats.spec import NESTED_BLOCK_SIZE
from kbit.ops import choose
from kbit.ops.schemas import library, tokens

# The most int8 products of 127 * 127 that an int32 sum holds.
INT32_K = (2**31 - 1) // 127**2


def as_float(scales: Tensor) -> Tensor:
    """Scales in fp32, from fp32 or from its bits as int32."""
    return scales.view(torch.float32) if scales.dtype == torch.int32 else scales


def block_scales(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """fp32 scales of a 4-bit tensor, decoded first where they are double-quantized."""
    if nested_absmax is None or nested_offset is None:
        return as_float(absmax)
    return double.dequantize_absmax(absmax, as_float(nested_absmax), as_float(nested_offset))


def dequantize_4bit(codes, absmax, nested_absmax, nested_offset, codebook, block_size, shape, dtype):
    scales = block_scales(absmax, nested_absmax, nested_offset)
    return blocks.dequantize_4bit(codes, scales, codebook, block_size, shape, dtype)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return double.dequantize_absmax(codes, as_float(nested_absmax), as_float(nested_offset))


def dequantize_dynamic(codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype) -> Tensor:
    return blocks.dequantize_dynamic(codes, as_float(absmax), signed, block_size, dtype)


def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return blocks.dequantize_int8(codes, as_float(absmax), dtype)


def linear_4bit(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):
    shape = (n, x.shape[-1])
    w = dequantize_4bit(weight, absmax, nested_absmax, nested_offset, codebook, block_size, shape, x.dtype)
    return F.linear(x, w, bias)


def linear_4bit_group(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):
    """One product after the other, each as its own backend does it."""
    lists = (weight, absmax, nested_absmax, nested_offset, bias, n)
    product = torch.ops.kbit.linear_4bit.default
    return [product(x, *parts, codebook, block_size, rows) for *parts, rows in zip(*lists, strict=True)]


def linear_8bit_group(x, weight, absmax, bias, outlier_threshold, int8_activations=None):
    product = torch.ops.kbit.linear_8bit.default
    columns = zip(weight, absmax, bias, strict=True)
    return [product(x, *parts, outlier_threshold, int8_activations) for parts in columns]


def linear_4bit_grad_input(grad, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k):
    shape = (grad.shape[-1], k)
    w = dequantize_4bit(weight, absmax, nested_absmax, nested_offset, codebook, block_size, shape, grad.dtype)
    return grad @ w


def linear_8bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    outlier_threshold: float,
    int8_activations: bool | None = None,
) -> Tensor:
    if not x.numel() or choose.linear_8bit_path(x.device.type, tokens(x), int8_activations) == "weight_only":
        return F.linear(x, dequantize_int8(weight, absmax, x.dtype), bias)
    out = llm_int8(x.reshape(-1, x.shape[-1]), weight, as_float(absmax), outlier_threshold)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def llm_int8(x: Tensor, weight: Tensor, absmax: Tensor, outlier_threshold: float, limit: int | None = None) -> Tensor:
    """LLM.int8() (arXiv 2208.07339): `x [M, K]` times int8 `weight [N, K]` with scales `absmax [N]`, fp32 `[M, N]`.

    A feature column that holds a magnitude of at least `outlier_threshold` leaves the int8 product and is multiplied
    with the dequantized weight, from x as it is. The row scales of x ignore the outlier elements only. A threshold of 0
    multiplies everything in int8. With more than `limit` such columns (None: `choose.llm_int8_outliers`) all of them
    leave it, on a CPU; elsewhere plain torch would have to wait for their number.
    """
    limit = choose.llm_int8_outliers(x.device.type, *x.shape) if limit is None else limit
    values = x.float()
    if outlier_threshold > 0:
        outlier = values.abs() >= outlier_threshold
        columns = outlier.any(dim=0)
        if x.device.type == "cpu" and int(columns.sum()) > limit:
            return _outlier_product(x, weight, absmax, torch.ones_like(columns))
        inner = values.masked_fill(outlier, 0.0)
        rows = inner.abs().amax(dim=1)
        inner = inner.masked_fill_(columns, 0.0)
    else:
        inner, rows = values, values.abs().amax(dim=1)
    codes = blocks.int8_codes(inner, rows)
    out = int8_product(codes, weight).float()
    out *= rows[:, None] * (1.0 / 127.0)
    out *= absmax * (1.0 / 127.0)
    if outlier_threshold > 0:
        out += _outlier_product(x, weight, absmax, columns)
    return out


def _outlier_product(x: Tensor, weight: Tensor, absmax: Tensor, columns: Tensor) -> Tensor:
    """fp32 product over the outlier `columns` (bool `[K]`) alone."""
    if x.device.type == "cpu":  # looking at the mask costs nothing here; elsewhere it would stall the device
        index = columns.nonzero().view(-1)
        x, weight = x.index_select(1, index), weight.index_select(1, index)
        # A product in bf16 would round the largest part of the sum, and lose to bitsandbytes' fp16.
        return x.float() @ blocks.dequantize_int8(weight, absmax, torch.float32).t()
    x = x.masked_fill(~columns, 0.0)
    return (x @ blocks.dequantize_int8(weight, absmax, x.dtype).t()).float()


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Exact `a [M, K] @ b [N, K]^T` of int8 values."""
    if a.device.type == "cpu" and 1 < a.shape[1] <= INT32_K:  # torch 2.13 multiplies one column with what lies beside b
        return torch._int_mm(a, b.t())
    if a.device.type == "cuda" and torch.version.hip is None and a.shape[1] <= INT32_K:
        # cuBLAS takes more than 16 rows, and K and N in eights; zeros fill up what is missing.
        (m, k), n = a.shape, b.shape[0]
        a = F.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
        b = F.pad(b, (0, -k % 8, 0, -n % 8))
        return torch._int_mm(a, b.t())[:m, :n]
    # Every product and every partial sum up to K = 2^38 is exact in float64.
    return a.double() @ b.double().t()


def linear_8bit_grad_input(grad: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    return grad @ dequantize_int8(weight, absmax, grad.dtype)


def by_expert(x: Tensor, offsets: Tensor, columns: int, product: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`product(rows of expert e, e)` for every expert that has rows, as `[S, columns]`; other rows are 0."""
    out = x.new_zeros((x.shape[0], columns))
    begin = 0
    for expert, end in enumerate(offsets.tolist()):  # on a GPU this waits for the routing; its own kernels do not
        if end > begin:
            out[begin:end] = product(x[begin:end], expert)
        begin = end
    return out


def expert_parts(
    expert: int,
    weights: int,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """(codes, fp32 scales) of one expert of `weights` elements, which have to be whole blocks, in flat order."""
    blocks_each = weights // block_size
    first = expert * blocks_each
    codes = codes.reshape(-1)[expert * weights // 2 : (expert + 1) * weights // 2]
    if nested_absmax is None or nested_offset is None:
        return codes, as_float(absmax.reshape(-1)[first : first + blocks_each])
    # Nested scales count blocks from the first expert on.
    position = torch.arange(first, first + blocks_each, device=absmax.device)
    return codes, _gathered_scales(position, absmax, nested_absmax, nested_offset)


def _expert_decoder(offsets, n, k, codes, absmax, nested_absmax, nested_offset, codebook, block_size, dtype):
    """A function that decodes the weight `[N, K]` of one expert."""
    if n * k % block_size:  # blocks cross from one expert into the next: decode all of them
        shape = (offsets.shape[0], n, k)
        whole = dequantize_4bit(codes, absmax, nested_absmax, nested_offset, codebook, block_size, shape, dtype)
        return whole.__getitem__

    def decode(expert: int) -> Tensor:
        part, scales = expert_parts(expert, n * k, codes, absmax, nested_absmax, nested_offset, block_size)
        return blocks.dequantize_4bit(part, scales, codebook, block_size, (n, k), dtype)

    return decode


def experts_4bit(x, offsets, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):
    scales = (absmax, nested_absmax, nested_offset)
    decode = _expert_decoder(offsets, n, x.shape[1], weight, *scales, codebook, block_size, x.dtype)
    return by_expert(x, offsets, n, lambda rows, e: F.linear(rows, decode(e), None if bias is None else bias[e]))


def experts_4bit_grad_input(grad, offsets, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k):
    scales = (absmax, nested_absmax, nested_offset)
    decode = _expert_decoder(offsets, grad.shape[1], k, weight, *scales, codebook, block_size, grad.dtype)
    return by_expert(grad, offsets, k, lambda rows, e: rows @ decode(e))


def experts_8bit(x: Tensor, offsets: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    def product(rows: Tensor, e: int) -> Tensor:
        return F.linear(rows, dequantize_int8(weight[e], absmax[e], x.dtype), None if bias is None else bias[e])

    return by_expert(x, offsets, weight.shape[1], product)


def experts_8bit_grad_input(grad: Tensor, offsets: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    def product(rows: Tensor, e: int) -> Tensor:
        return rows @ dequantize_int8(weight[e], absmax[e], grad.dtype)

    return by_expert(grad, offsets, weight.shape[2], product)


def embedding_4bit(ids, weight, absmax, nested_absmax, nested_offset, codebook, block_size, dim, dtype):
    rows = ids.reshape(-1, 1).long()
    if absmax.dim() == 2:  # row layout: gather the rows, then decode as usual
        codes = weight.index_select(0, rows.view(-1))
        position = rows * absmax.shape[1] + torch.arange(absmax.shape[1], device=rows.device)
        scales = _gathered_scales(position, absmax, nested_absmax, nested_offset)
        return blocks.dequantize_4bit(codes, scales, codebook, block_size, (*ids.shape, dim), dtype)
    # Flat layout: a row starts in the middle of a block, or even of a byte. Gather element by element.
    element = rows * dim + torch.arange(dim, device=ids.device)
    byte = weight.index_select(0, (element // 2).view(-1)).view(element.shape)
    code = torch.where(element % 2 == 0, byte >> 4, byte & 15)
    scales = _gathered_scales(element // block_size, absmax, nested_absmax, nested_offset)
    values = codebook_table(codebook, weight.device)[code.int()]
    return (values * scales).to(dtype).view(*ids.shape, dim)


def _gathered_scales(
    position: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None
) -> Tensor:
    """fp32 scales of the blocks at flat `position` (any shape) among all blocks."""
    scales = absmax.reshape(-1)[position]
    if nested_absmax is None or nested_offset is None:
        return as_float(scales)
    values = codebook_table("dynamic8", absmax.device)[scales.int()]
    return values * as_float(nested_absmax)[position // NESTED_BLOCK_SIZE] + as_float(nested_offset)


def embedding_8bit(ids: Tensor, weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    rows = ids.reshape(-1).long()
    # index_select refuses a negative row, which indexing would count from the end.
    values = dequantize_int8(weight.index_select(0, rows), absmax.index_select(0, rows), dtype)
    return values.view(*ids.shape, weight.shape[-1])


IMPLEMENTATIONS = {
    "quantize_4bit": blocks.quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "quantize_absmax": double.quantize_absmax,
    "dequantize_absmax": dequantize_absmax,
    "quantize_int8": blocks.quantize_int8,
    "dequantize_int8": dequantize_int8,
    "quantize_dynamic": blocks.quantize_dynamic,
    "dequantize_dynamic": dequantize_dynamic,
    "linear_4bit": linear_4bit,
    "linear_4bit_group": linear_4bit_group,
    "linear_4bit_grad_input": linear_4bit_grad_input,
    "linear_8bit": linear_8bit,
    "linear_8bit_group": linear_8bit_group,
    "linear_8bit_grad_input": linear_8bit_grad_input,
    "experts_4bit": experts_4bit,
    "experts_4bit_grad_input": experts_4bit_grad_input,
    "experts_8bit": experts_8bit,
    "experts_8bit_grad_input": experts_8bit_grad_input,
    "embedding_4bit": embedding_4bit,
    "embedding_8bit": embedding_8bit,
}

for _name, _function in IMPLEMENTATIONS.items():
    library.impl(_name, _function, "CompositeExplicitAutograd")
