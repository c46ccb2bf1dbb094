"""Products with a 4-bit weight, decoding and embedding on the CPU: launchers of linear_4bit.cpp.

The weight is decoded inside the product: for few tokens, and on AVX512 for any number. Otherwise slices of it are
decoded into a buffer, and torch's library multiplies with each slice while the caches hold it: layouts that the product
does not read, many tokens below AVX512, and bf16 where torch has AMX tiles.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kbit.formats.codebooks import codebook as codebook_table
from kbit.kernels.cpu.library import DTYPES, function

# struct Task of task_4bit.h: pointers of W, n, k, block_size; x, bias, out; m, x_stride, n0, n1, k0, k1; dtype and
# threads.
# Packed bytes cost a fifth of a ctypes.Structure, which would be a third of a call's overhead.
_TASK = struct.Struct("@6P3q3P6q2i")
_PRODUCT = (ctypes.c_char_p, ctypes.c_int64)


@functools.cache
def _table(name: str) -> int:
    return codebook_table(name).data_ptr()  # cached there, never freed


def _function(name: str) -> Callable[[bytes], int]:
    return function(name, (ctypes.c_char_p,), ctypes.c_int32)


class Weight:
    """`W [N, K]` in 4 bits: its pointers, and the tensors that they point to."""

    __slots__ = ("block_size", "fields", "k", "n", "tensors")

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        codebook: str,
        block_size: int,
        n: int,
        k: int,
    ) -> None:
        codes = codes if codes.is_contiguous() else codes.contiguous()
        absmax = absmax if absmax.is_contiguous() else absmax.contiguous()
        nested = offset = 0
        if nested_absmax is not None and nested_offset is not None:
            nested_absmax = nested_absmax.contiguous()
            nested, offset = nested_absmax.data_ptr(), nested_offset.data_ptr()
        self.tensors = (codes, absmax, nested_absmax, nested_offset)
        self.n, self.k, self.block_size = n, k, block_size
        pointers = (codes.data_ptr(), absmax.data_ptr(), nested, offset, _table("dynamic8"), _table(codebook))
        self.fields = (*pointers, n, k, block_size)


def fused(x: Tensor, weight: Weight, bias: Tensor | None, n0: int, n1: int, out: Tensor) -> None:
    """`x [M, K] @ W[n0:n1]^T + bias` into `out [M, n1 - n0]` (contiguous), decoding inside the product.

    For the row layout: K a multiple of the block size. x's rows are contiguous; bias `[n1 - n0]` has its dtype.
    """
    _multiply(_task(x, weight, bias, n0, n1, out), 1)


def fused_group(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], outs: Sequence[Tensor]) -> None:
    """The same with all of several weights of one K and one block size: `x @ W[i]^T + bias[i]` into `outs[i]`."""
    parts = zip(weights, biases, outs, strict=True)
    _multiply(b"".join([_task(x, weight, bias, 0, weight.n, out) for weight, bias, out in parts]), len(weights))


def _task(x: Tensor, weight: Weight, bias: Tensor | None, n0: int, n1: int, out: Tensor) -> bytes:
    bias_at = 0 if bias is None else bias.data_ptr()
    rows = (x.data_ptr(), bias_at, out.data_ptr(), x.shape[0], x.stride(0))
    return _TASK.pack(*weight.fields, *rows, n0, n1, 0, 0, DTYPES[x.dtype], torch.get_num_threads())


def _multiply(tasks: bytes, count: int) -> None:
    if function("kbit_linear_4bit", _PRODUCT, ctypes.c_int32)(tasks, count):
        raise MemoryError("no memory for the scratch buffers of a 4-bit product")


def decode(weight: Weight, n0: int, n1: int, k0: int, k1: int, out: Tensor) -> None:
    """`W[n0:n1, k0:k1]` into `out` (contiguous, of that many elements), in out's dtype."""
    threads, dtype = torch.get_num_threads(), DTYPES[out.dtype]
    task = _TASK.pack(*weight.fields, 0, 0, out.data_ptr(), 0, 0, n0, n1, k0, k1, dtype, threads)
    _function("kbit_decode_4bit")(task)


def sliced(x: Tensor, weight: Weight, bias: Tensor | None, n0: int, n1: int, out: Tensor, rows: int) -> None:
    """What `fused` does, in any layout: `rows` rows of W at a time are decoded and given to torch."""
    buffer = x.new_empty(min(rows, n1 - n0), weight.k)
    for begin in range(n0, n1, rows):
        end = min(begin + rows, n1)
        part, here = buffer[: end - begin], out[:, begin - n0 : end - n0]
        decode(weight, begin, end, 0, weight.k, part)
        if bias is None:
            torch.mm(x, part.t(), out=here)
        else:
            torch.addmm(bias[begin - n0 : end - n0], x, part.t(), out=here)


def grad_input(grad: Tensor, weight: Weight, n0: int, n1: int, out: Tensor, columns: int) -> None:
    """`grad [M, n1 - n0] @ W[n0:n1]` into `out [M, K]`, `columns` columns of W at a time."""
    buffer = grad.new_empty((n1 - n0) * min(columns, weight.k))
    for begin in range(0, weight.k, columns):
        end = min(begin + columns, weight.k)
        part = buffer[: (n1 - n0) * (end - begin)].view(n1 - n0, end - begin)
        decode(weight, n0, n1, begin, end, part)
        torch.mm(grad, part, out=out[:, begin:end])


_RUN = 4096


def dequantize(codes: Tensor, scales: Sequence[Tensor | None], codebook: str, block_size: int, out: Tensor) -> None:
    """All weights in flat order into `out` (contiguous)."""
    absmax, nested_absmax, nested_offset = scales
    assert absmax is not None
    whole, rest = divmod(out.numel(), _RUN)
    weight = Weight(codes, absmax, nested_absmax, nested_offset, codebook, block_size, whole + 1, _RUN)
    flat = out.view(-1)
    if whole:
        decode(weight, 0, whole, 0, _RUN, flat)
    if rest:
        decode(weight, whole, whole + 1, 0, rest, flat[whole * _RUN :])


def embedding(ids: Tensor, weight: Weight, out: Tensor) -> None:
    """Rows `ids` (int64, contiguous) of W into `out [ids, K]`. Raises IndexError for a row that does not exist."""
    rows = (ids.data_ptr(), 0, out.data_ptr(), ids.numel(), 0)
    task = _TASK.pack(*weight.fields, *rows, 0, weight.n, 0, weight.k, DTYPES[out.dtype], torch.get_num_threads())
    if _function("kbit_embedding_4bit")(task):
        raise IndexError(f"index out of range in an embedding of {weight.n} rows")
