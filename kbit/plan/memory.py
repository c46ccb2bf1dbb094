"""Bytes beside the weights: KV cache, activations, adapter, gradients, optimizer states.

Activations are what autograd keeps of the transformers implementation in 16 bits with fused attention, term by term;
tests/plan compares them with what real models save. Everything here is arithmetic on a ModelShape.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from kbit.formats.spec import Format
from kbit.plan.shape import ModelShape

TRAIN_MODES = ("none", "lora", "qlora", "full")

# States per element that an optimizer keeps.
_STATES = {
    "adam": 2,
    "adamw": 2,
    "lamb": 2,
    "ademamix": 3,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "lars": 1,
    "sgd": 0,
    "sgd-momentum": 1,
}
# 8-bit optimizers keep the states of small tensors in fp32 ("8-bit Optimizers", arXiv 2110.02861).
_SMALLEST_8BIT = 4096


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer's memory: `states` values of `bits` an element; paged ones live in host memory."""

    name: str
    states: int
    bits: int
    paged: bool

    @classmethod
    def parse(cls, name: str) -> Optimizer:
        """From "adamw8bit", "paged-adamw-8bit", "lion", "sgd" ... Raises ValueError that lists the known names."""
        text = re.sub(r"[\s_-]+", "-", name.strip().lower())
        paged = text.startswith("paged-") or (text.startswith("paged") and text.removeprefix("paged")[:1].isalpha())
        base = text.removeprefix("paged").lstrip("-")
        bits = 32
        if match := re.fullmatch(r"(.+?)-?(8|32)-?bit", base):
            base, bits = match[1], int(match[2])
        if base not in _STATES or (bits == 8 and not _STATES[base]):
            known = ", ".join(f"{key}, {key}8bit" if count else key for key, count in _STATES.items())
            raise ValueError(f"unknown optimizer {name!r}; known: {known}; each also as paged-NAME")
        return cls(f"{'paged-' if paged else ''}{base}{'8bit' if bits == 8 else ''}", _STATES[base], bits, paged)

    def nbytes(self, sizes: Sequence[int]) -> int:
        """Bytes of the states of tensors of these many elements."""
        small = Format("dynamic8", 256)
        eight = self.bits == 8
        return self.states * sum(
            small.nbytes((size,)) if eight and size >= _SMALLEST_8BIT else 4 * size for size in sizes
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device, and `host` bytes in main memory (paged optimizer states)."""

    weights: int
    kv_cache: int
    activations: int
    adapter: int
    gradients: int
    optimizer: int
    overhead: int
    host: int = 0

    @property
    def total(self) -> int:
        """Everything on the device."""
        parts = (self.weights, self.kv_cache, self.activations, self.adapter, self.gradients, self.optimizer)
        return sum(parts) + self.overhead

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "total": self.total}


def kv_cache(shape: ModelShape, context: int, batch: int, element: int = 2) -> int:
    """Keys and values of `batch` sequences of `context` tokens; a sliding window keeps no more than its width.

    element: bytes of a value (2 for bf16).
    """
    tokens = sum(
        kind.width * (context if kind.window is None else min(context, kind.window)) for kind in shape.attention
    )
    return batch * tokens * element


def inference_activations(shape: ModelShape, context: int, batch: int, workspace: int = 0) -> int:
    """Peak while a prompt of `context` tokens is read: the residual stream, one layer, the last token's logits.

    workspace: bytes of the largest weight that is dequantized as a whole for products of many tokens.
    """
    attention = 2 * (shape.query + 2 * shape.kv) * 2 + 2 * shape.query
    mlp = 2 * shape.intermediate * (3 if shape.gated_mlp else 2)
    norm = 8 * shape.hidden  # computed in fp32
    token = 4 * shape.hidden + max(attention, mlp, norm)
    return batch * context * token + batch * shape.vocab * (2 + 4) + workspace


def training_activations(
    shape: ModelShape,
    context: int,
    batch: int,
    *,
    checkpointing: bool,
    adapters: Sequence[tuple[int, int]] = (),
    rank: int = 0,
    workspace: int = 0,
) -> int:
    """Peak between forward and backward of one step on `batch` sequences of `context` tokens.

    adapters: `(N, K)` of the layers that carry LoRA adapters of `rank`; empty when everything is trained.
    checkpointing: a layer keeps only its input and computes the rest again in backward.
    workspace: as in `inference_activations`.
    """
    tokens = batch * context
    if not shape.layers:
        return 0
    layers = shape.layers * layer_activations(shape, context, adapters, rank)
    if checkpointing:
        # Every layer's input, and one layer in full while its backward runs.
        layers = 2 * shape.hidden * shape.layers + layers // shape.layers
    # Backward holds the gradients of one MLP beside what forward saved.
    backward = 4 * shape.intermediate + 6 * shape.hidden
    # 16-bit logits, their fp32 copy, its log-softmax, and the gradient of that.
    logits = shape.vocab * (2 + 4 + 4 + 4)
    return tokens * (layers + shape.norm_bytes * shape.hidden + max(backward, logits)) + workspace


def layer_activations(shape: ModelShape, context: int, adapters: Sequence[tuple[int, int]] = (), rank: int = 0) -> int:
    """Bytes that autograd saves for one token in one layer, on average over the layers."""
    hidden, inner = shape.hidden, shape.intermediate
    attention = 2 * (shape.query + 2 * shape.kv) + 2 * shape.query + 4 * shape.heads  # q, k, v, the output, log-sum-exp
    if shape.eager:
        attention += 8 * shape.heads * context  # scores in 16 bits, softmax in fp32 and in 16 bits
    if not adapters:
        # A norm saves what it normalizes and its result, which the linear layers behind it save too.
        norms = shape.norms * shape.norm_bytes * hidden
        norms += (shape.norm_bytes - 2) * (shape.query + shape.kv) if shape.qk_norm else 0
        return attention + norms + 2 * shape.mlp_saved * inner
    # Frozen weights need no input saved, and a frozen norm no result. But every adapter keeps its own fp32 copy of its
    # input (its weights are fp32), and the product with A.
    norms = shape.norm_bytes // 2 * (shape.norms * hidden + (shape.query + shape.kv if shape.qk_norm else 0))
    mlp = 2 * (shape.mlp_saved if shape.relu else shape.mlp_saved - 1) * inner
    return attention + norms + mlp + sum(4 * k + 4 * rank for _, k in adapters) // shape.layers


def adapter_sizes(adapters: Sequence[tuple[int, int]], rank: int) -> list[int]:
    """Elements of the LoRA matrices A `[rank, K]` and B `[N, rank]` of each layer."""
    return [size for n, k in adapters for size in (rank * k, n * rank)]


def overhead(memory: int | None, working: int) -> int:
    """What the runtime takes and the allocator wastes: a CUDA context (0.5 GB; less where memory is small) and 5% of
    what comes and goes (activations, gradients).
    """
    context = 500_000_000 if memory is None else min(500_000_000, memory // 25)
    return context + working // 20
