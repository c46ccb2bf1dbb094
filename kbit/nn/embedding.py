"""`Embedding4bit` and `Embedding8bit`: nn.Embedding with its table in 4 or 8 bits; a look-up decodes its rows alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kbit import ops
from kbit.formats.spec import Format
from kbit.nn.base import QuantizedModule


class _QuantizedEmbedding(QuantizedModule, nn.Embedding):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        fmt: Format,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.original_class = nn.Embedding
        self._init_weight(fmt, (num_embeddings, embedding_dim), device, dtype)

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of looked-up rows: the table's, or what `.half()`, `.bfloat16()` and `.to(dtype)` made of it."""
        return self.cast_dtype or self.weight_dtype

    def reset_parameters(self) -> None:
        """Nothing to draw: quantized weights come from a checkpoint or another layer."""

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._format_repr()}"

    @classmethod
    def _from_embedding(cls, embedding: nn.Embedding, name: str | None, **kwargs: object):  # type: ignore[no-untyped-def]
        if embedding.max_norm is not None:
            raise ValueError("an embedding with max_norm rewrites its rows in forward and cannot be quantized")
        weight = embedding.weight
        layer = cls(*weight.shape, embedding.padding_idx, device="meta", dtype=weight.dtype, **kwargs)  # type: ignore
        layer.quantize_from(weight, name)
        return layer


class Embedding4bit(_QuantizedEmbedding):
    """An embedding table `[rows, dim]` in NF4 or FP4; Parameters as in Linear4bit (N rows, K dim).

    ids of any integer dtype and shape `[...]` give `[..., dim]` in the table's dtype. Frozen: no gradient reaches it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: Format | str = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        fmt = Format.parse(format) if isinstance(format, str) else format
        if not fmt.is_4bit:
            raise ValueError(f"Embedding4bit stores nf4 or fp4, not {fmt.name}; use Embedding8bit for int8")
        super().__init__(num_embeddings, embedding_dim, padding_idx, fmt, device, dtype)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, format: Format | str = "nf4", name: str | None = None
    ) -> Embedding4bit:
        """A quantized copy of `embedding`. ValueError for a table with max_norm."""
        return cls._from_embedding(embedding, name, format=format)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: `[...]`, integers -> `[..., dim]`."""
        fmt = self.weight_format
        return ops.embedding_4bit(
            ids,
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            fmt.name,
            fmt.block_size,
            self.embedding_dim,
            self.output_dtype,
        )


class Embedding8bit(_QuantizedEmbedding):
    """An embedding table `[rows, dim]` in int8 with one scale a row; Parameters as in Linear8bit. Frozen."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, Format("int8", 0), device, dtype)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, name: str | None = None) -> Embedding8bit:
        """A quantized copy of `embedding`. ValueError for a table with max_norm."""
        return cls._from_embedding(embedding, name)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: `[...]`, integers -> `[..., dim]`."""
        return ops.embedding_8bit(ids, self.weight, self.absmax, self.output_dtype)
