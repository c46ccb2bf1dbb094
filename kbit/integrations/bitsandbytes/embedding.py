"""bitsandbytes' embeddings: stable ones, whose optimizer state stays in 32 bits, and 4-bit and 8-bit tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kbit.checkpoint.bnb import as_bytes
from kbit.integrations.bitsandbytes.identity import lives_in
from kbit.integrations.bitsandbytes.linear import Module4bit, weight_state
from kbit.integrations.bitsandbytes.params import Int8Params, Params4bit, apply_across_meta


def _keep_state_in_32_bits(module: nn.Embedding) -> None:
    """Embedding gradients are sparse and uneven, which 8-bit optimizer states do not take well."""
    from kbit.integrations.bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


@lives_in("bitsandbytes.nn.modules")
class Embedding(nn.Embedding):
    """nn.Embedding with Xavier initialization, whose 8-bit optimizers keep a 32-bit state."""

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        _keep_state_in_32_bits(self)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


@lives_in("bitsandbytes.nn.modules")
class StableEmbedding(Embedding):
    """Embedding followed by a layer norm in the default dtype ("8-bit Optimizers", arXiv 2110.02861, section 2.3)."""

    def __init__(  # type: ignore[no-untyped-def]
        self, num_embeddings: int, embedding_dim: int, *args, **kwargs
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """ids `[...]` -> `[..., dim]` in the table's dtype."""
        return self.norm(super().forward(input).to(self.norm.weight.dtype)).to(self.weight.dtype)


@lives_in("bitsandbytes.nn.modules")
class Embedding4bit(Module4bit, nn.Embedding):
    """An embedding table in 4 bits, quantized when it moves to a device; a look-up decodes its rows alone."""

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device=None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.quant_state = None
        self.quant_storage = quant_storage
        self.weight_shape = (num_embeddings, embedding_dim)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )

    def forward(self, input: Tensor) -> Tensor:
        """ids `[...]` -> `[..., dim]` in the table's dtype."""
        state = weight_state(self)
        assert state.blocksize is not None and state.quant_type is not None
        codes = as_bytes(self.weight)
        scales, nested_absmax, nested_offset = state.scales()
        if self.embedding_dim % state.blocksize == 0:
            codes = codes.view(self.num_embeddings, self.embedding_dim // 2)
            scales = scales.view(self.num_embeddings, self.embedding_dim // state.blocksize)
        return torch.ops.kbit.embedding_4bit(
            input,
            codes,
            scales,
            nested_absmax,
            nested_offset,
            state.quant_type,
            state.blocksize,
            self.embedding_dim,
            self.dtype,
        )


@lives_in("bitsandbytes.nn.modules")
class EmbeddingFP4(Embedding4bit):
    """Embedding4bit with FP4."""

    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


@lives_in("bitsandbytes.nn.modules")
class EmbeddingNF4(Embedding4bit):
    """Embedding4bit with NF4."""

    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


@lives_in("bitsandbytes.nn.modules")
class Embedding8bit(nn.Embedding):
    """An embedding table in row-wise int8, quantized when it moves to a device."""

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        apply_across_meta(self, fn)
        super()._apply(fn, recurse)
        weight = self.weight
        if isinstance(weight, Int8Params) and weight.dtype == torch.int8 and not weight.is_meta:
            weight.CB = weight.data
            if weight.SCB is not None:
                weight.SCB = weight.SCB.to(weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.SCB is not None:
            destination[f"{prefix}SCB"] = self.weight.SCB if keep_vars else self.weight.SCB.detach()

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        weight, scales = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}SCB")
        quantized = weight is not None and weight.dtype == torch.int8
        if quantized != (scales is not None):
            error_msgs.append(f"{prefix}weight and {prefix}SCB belong together: int8 codes and their row scales")
            return
        if not quantized and weight is not None and self.weight.dtype == torch.int8:
            error_msgs.append(f"{prefix}weight is {weight.dtype}, but this table is quantized already")
            return
        if quantized:
            device = weight.device if self.weight.is_meta else self.weight.device
            codes = weight.detach().to(device, copy=True)
            self.weight = new = Int8Params(codes, requires_grad=False, CB=codes, SCB=scales.float().to(device))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if quantized:
            self.weight = new
            unexpected_keys[:] = [key for key in unexpected_keys if key != f"{prefix}SCB"]

    def forward(self, input: Tensor) -> Tensor:
        """ids `[...]` -> `[..., dim]` in the table's dtype. RuntimeError before the table was quantized."""
        if self.weight.SCB is None:
            raise RuntimeError(
                'this Embedding8bit is not quantized yet: move it to a device first, e.g. module.to("cpu")'
            )
        return torch.ops.kbit.embedding_8bit(input, self.weight.data, self.weight.SCB, self.dtype)
