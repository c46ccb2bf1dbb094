"""Decoding steps that are compiled and captured in a CUDA graph, of the model that `benchmarks.end_to_end` builds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import verify

if TYPE_CHECKING:
    from benchmarks.end_to_end import Bench

# Logits of a compiled model against the same model eager. Random weights through 32 layers make 6% of bf16's rounding
# alone (measured), and more where int8 codes flip too; a wrong mask, position or cache makes more than 100%.
LOGITS = {"bf16": 0.12, "nf4": 0.12, "fp4": 0.12, "bnb-nf4": 0.12, "int8": 0.3, "bnb-int8": 0.3}
LOGITS |= {"int8-drawn": 0.3, "int8-all": 0.3}


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """One token's attention `[batch, 1, heads, dim]`: query `[batch, heads, 1, dim]` and a cache of fewer heads."""
    batch, heads, _one, dim = query.shape
    packed = query.view(batch, key.shape[1], heads // key.shape[1], dim)
    out = nn.functional.scaled_dot_product_attention(packed, key, value, attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, dim), None


class LayerCache:
    """Keys and values of one layer at fixed addresses, written at `position`: what a decoder layer calls a cache."""

    def __init__(self, model: nn.Module, batch: int, length: int, position: Tensor) -> None:
        config = model.config
        dim = config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, length, dim)
        self.keys = torch.zeros(shape, device=position.device, dtype=torch.bfloat16)
        self.values = torch.zeros_like(self.keys)
        self.position = position

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


class Decoder:
    """One decoding step with transformers' own modules, at fixed addresses: `ids [batch, 1]` becomes the next token."""

    def __init__(self, bench: Bench, model: nn.Module, batch: int) -> None:
        length, device = bench.max_length, bench.device
        self.attention = bench.attention
        if bench.attention_kernel == "packed":
            from transformers import AttentionInterface

            AttentionInterface.register("packed", packed_attention)
            model.config._attn_implementation = "packed"
        self.model = model.model
        self.head = model.lm_head
        self.ids = torch.zeros((batch, 1), dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.slots = torch.arange(length, device=device)
        self.caches = [LayerCache(model, batch, length, self.position) for _ in self.model.layers]
        for layer in self.model.layers:
            layer.self_attn.layer_idx = 0  # else each layer would compile anew; every layer has its own cache
        self.layer = bench.compiled(type(self.model.layers[0]).forward)
        self.tail = bench.compiled(self._tail)
        self.logits: Tensor

    def _tail(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.model.norm(hidden))[:, -1]
        return logits, logits.argmax(dim=-1, keepdim=True)

    def __call__(self, keep: bool = False) -> None:
        """One step under the chosen attention kernel."""
        with self.attention():
            self._step(keep)

    def _step(self, keep: bool) -> None:
        """Logits of the next token; unless `keep`, it becomes the input, one position further."""
        hidden = self.model.embed_tokens(self.ids)
        position = self.position.unsqueeze(0)
        rotary = self.model.rotary_emb(hidden, position)
        mask = (self.slots <= self.position).view(1, 1, 1, -1)
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            hidden = self.layer(
                layer,
                hidden,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                position_embeddings=rotary,
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        self.logits, chosen = self.tail(hidden)
        if not keep:
            self.ids.copy_(chosen)
            self.position += 1


@torch.no_grad()
def compiled_decode(bench: Bench, label: str, model: nn.Module, batch: int) -> dict[str, Any]:
    torch._dynamo.reset()
    prompt = torch.randint(0, model.config.vocab_size, (batch, bench.prompt), device=bench.device)
    expected = model(prompt, use_cache=False, logits_to_keep=1).logits[:, -1]
    before = [layer.self_attn.layer_idx for layer in model.model.layers]
    attention = model.config._attn_implementation
    begin = time.perf_counter()
    try:
        step = Decoder(bench, model, batch)
        for i in range(bench.prompt):
            step.ids.copy_(prompt[:, i : i + 1])
            step(keep=True)
            step.position += 1
        bench.sync()
        compiled = time.perf_counter() - begin
        error = verify.require_close(f"{label}, compiled logits", step.logits, expected, LOGITS[label])
        run: Callable[[], object] = step
        if bench.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        step.position.fill_(bench.prompt)
        times = []
        for _ in range(3):
            run()
            bench.sync()
            begin = time.perf_counter()
            for _ in range(bench.steps // 3):
                run()
            bench.sync()
            times.append((time.perf_counter() - begin) / (bench.steps // 3))
    finally:
        model.config._attn_implementation = attention
        for layer, index in zip(model.model.layers, before, strict=True):
            layer.self_attn.layer_idx = index
    seconds = statistics.median(times)
    return {
        "tokens_a_second": round(batch / seconds, 1),
        "ms_a_step": round(seconds * 1e3, 3),
        "compile_s": round(compiled, 1),
        "logits_error": float(f"{error:.2g}"),
    }


@torch.no_grad()
def whole_decode(bench: Bench, label: str, model: nn.Module, batch: int) -> dict[str, Any]:
    """transformers' own forward and StaticCache under torch.compile(mode="reduce-overhead", fullgraph=True)."""
    from transformers import StaticCache

    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=bench.max_length)
    prompt = torch.randint(0, model.config.vocab_size, (batch, bench.prompt), device=bench.device)
    expected = model(prompt, use_cache=False, logits_to_keep=1).logits[:, -1]
    model(prompt[:, :-1], past_key_values=cache, use_cache=True)
    begin = time.perf_counter()
    forward = bench.compiled(model.forward, mode="reduce-overhead")
    ids = prompt[:, -1:].clone()
    at = torch.tensor([[bench.prompt - 1]], device=bench.device)

    def step() -> Tensor:
        return forward(ids, position_ids=at, past_key_values=cache, use_cache=True).logits[:, -1]

    error = verify.require_close(f"{label}, compiled logits", step(), expected, LOGITS[label])
    for _ in range(3):
        ids.copy_(step().argmax(dim=-1, keepdim=True))
    bench.sync()
    compiled = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(bench.steps // 2):
        ids.copy_(step().argmax(dim=-1, keepdim=True))
    bench.sync()
    seconds = (time.perf_counter() - begin) / (bench.steps // 2)
    return {
        "tokens_a_second": round(batch / seconds, 1),
        "ms_a_step": round(seconds * 1e3, 3),
        "compile_s": round(compiled, 1),
        "logits_error": float(f"{error:.2g}"),
    }
