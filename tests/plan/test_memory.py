"""Caches, activations, adapters and optimizer states against what transformers, autograd and PEFT really keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kbit.plan import memory as mem
from kbit.plan.memory import Optimizer
from kbit.plan.shape import Attention, ModelShape, shape_of
from kbit.plan.weights import linear_shapes

pytest.importorskip("transformers")


def shape_for(model: Any) -> ModelShape:
    return shape_of(model.config, model)


def cache_bytes(cache: Any) -> int:
    """Bytes of every distinct tensor that a transformers cache holds, self- and cross-attention."""
    parts = (
        [cache.self_attention_cache, cache.cross_attention_cache]
        if hasattr(cache, "cross_attention_cache")
        else [cache]
    )
    return sum(t.nbytes for part in parts for layer in part.layers for t in (layer.keys, layer.values))


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "t5", "mixtral"])
@pytest.mark.parametrize(("batch", "context"), [(1, 16), (3, 64)])
def test_kv_cache_is_what_transformers_keeps(build, name: str, batch: int, context: int) -> None:  # type: ignore[no-untyped-def]
    model = build(name).bfloat16().eval()
    ids = torch.randint(5, 500, (batch, context))
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, **inputs).past_key_values
    assert mem.kv_cache(shape_for(model), context, batch) == cache_bytes(cache)


def test_sliding_window_bounds_the_cache(build) -> None:  # type: ignore[no-untyped-def]
    """The window is 32: transformers keeps that many tokens less the one that comes next."""
    model = build("mistral").bfloat16().eval()
    with torch.no_grad():
        cache = model(input_ids=torch.randint(5, 500, (1, 100)), use_cache=True).past_key_values
    planned = mem.kv_cache(shape_for(model), 100, 1)
    assert planned == mem.kv_cache(shape_for(model), 1000, 1)
    assert cache_bytes(cache) * 32 == planned * cache.layers[0].keys.shape[2]
    assert cache.layers[0].keys.shape[2] in (31, 32)


def test_layers_may_alternate() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=128,
        sliding_window=16,
    )
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config)
    shape = shape_for(model)
    assert sorted(kind.window or 0 for kind in shape.attention) == [0, 0, 16, 16]
    assert mem.kv_cache(shape, 100, 1) == 2 * 2 * (2 * 32) * (100 + 16)


def test_encoders_have_no_cache(build) -> None:  # type: ignore[no-untyped-def]
    assert mem.kv_cache(shape_for(build("bert-masked-lm")), 512, 8) == 0


def test_cross_attention_counts() -> None:
    assert Attention(8, cross=True) != Attention(8)


def saved_bytes(model: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, Parameters and buffers left out, each storage once."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    live: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            live[storage._cdata] = storage  # kept alive, so that no address is used twice
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in live.values())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_layer_activations_are_what_autograd_saves(build, name: str, lora: bool) -> None:  # type: ignore[no-untyped-def]
    """A second pair of layers costs what the formula says, within 10%."""
    tokens, rank, saved = 64, 8, []
    for layers in (2, 4):
        model = build(name)
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = ["full_attention"] * layers
        model = type(model)(model.config).bfloat16()
        shape, adapters = shape_for(model), linear_shapes(model) if lora else []
        if name == "opt":  # project_in and project_out stand outside the layers
            adapters = [(n, k) for n, k in adapters if 64 not in (n, k)]
        if lora:
            peft = pytest.importorskip("peft")
            config = peft.LoraConfig(r=rank, target_modules="all-linear")
            model = peft.get_peft_model(model.requires_grad_(False), config)
        saved.append(saved_bytes(model, torch.randint(5, 500, (2, tokens))))
    measured = (saved[1] - saved[0]) / 2 / (2 * tokens)
    assert mem.layer_activations(shape, tokens, adapters, rank) == pytest.approx(measured, rel=0.1)


def test_checkpointing_keeps_one_input_a_layer(build) -> None:  # type: ignore[no-untyped-def]
    shape = shape_for(build("llama"))
    plain = mem.training_activations(shape, 64, 2, checkpointing=False)
    less = mem.training_activations(shape, 64, 2, checkpointing=True)
    layer = mem.layer_activations(shape, 64)
    assert plain - less == 2 * 64 * (shape.layers * (layer - 2 * shape.hidden) - layer)


def test_logits_dominate_where_the_vocabulary_is_large(build) -> None:  # type: ignore[no-untyped-def]
    import dataclasses

    shape = shape_for(build("llama"))
    large = dataclasses.replace(shape, vocab=128_000)
    more = mem.training_activations(large, 100, 1, checkpointing=True) - mem.training_activations(
        dataclasses.replace(shape, vocab=64_000), 100, 1, checkpointing=True
    )
    assert more == 100 * 64_000 * 14  # bf16 logits, fp32 copy, log-softmax, its gradient


def test_workspace_and_batch_add_up(build) -> None:  # type: ignore[no-untyped-def]
    shape = shape_for(build("llama"))
    one = mem.inference_activations(shape, 64, 1)
    assert mem.inference_activations(shape, 64, 4) == 4 * one
    assert mem.inference_activations(shape, 64, 1, workspace=1000) == one + 1000


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "opt"])
def test_adapter_size_is_what_peft_makes(build, name: str) -> None:  # type: ignore[no-untyped-def]
    peft = pytest.importorskip("peft")
    model = build(name).bfloat16()
    linears = linear_shapes(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    real = [p for p in model.parameters() if p.requires_grad]
    assert sorted(mem.adapter_sizes(linears, 8)) == sorted(p.numel() for p in real)
    assert {p.dtype for p in real} == {torch.float32}


@pytest.mark.parametrize(
    ("text", "states", "bits", "paged", "name"),
    [
        ("adamw", 2, 32, False, "adamw"),
        ("AdamW8bit", 2, 8, False, "adamw8bit"),
        ("adamw_8bit", 2, 8, False, "adamw8bit"),
        ("adamw-32bit", 2, 32, False, "adamw"),
        ("paged-adamw8bit", 2, 8, True, "paged-adamw8bit"),
        ("PagedAdamW8bit", 2, 8, True, "paged-adamw8bit"),
        ("paged_lion_32bit", 1, 32, True, "paged-lion"),
        ("ademamix8bit", 3, 8, False, "ademamix8bit"),
        ("sgd", 0, 32, False, "sgd"),
    ],
)
def test_optimizer_names(text: str, states: int, bits: int, paged: bool, name: str) -> None:
    assert Optimizer.parse(text) == Optimizer(name, states, bits, paged)


@pytest.mark.parametrize("text", ["adamx", "adamw4bit", "sgd8bit", "paged", "", "paged-"])
def test_unknown_optimizer(text: str) -> None:
    with pytest.raises(ValueError, match="unknown optimizer .*; known: adam"):
        Optimizer.parse(text)


def test_optimizer_bytes() -> None:
    assert Optimizer.parse("adamw").nbytes([1000, 24]) == 2 * 4 * 1024
    assert Optimizer.parse("sgd").nbytes([10_000]) == 0
    # A code an element and a scale for 256; a tensor below 4096 elements stays in fp32.
    assert Optimizer.parse("lion8bit").nbytes([4096]) == 4096 + 4 * 16
    assert Optimizer.parse("lion8bit").nbytes([4095]) == 4 * 4095
    assert Optimizer.parse("paged-adamw8bit").nbytes([4096, 4095]) == 2 * (4096 + 64 + 4 * 4095)


def test_torch_adamw_keeps_that_much() -> None:
    parameter = torch.nn.Parameter(torch.randn(5000))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[parameter].values() if value.dim())
    assert Optimizer.parse("adamw").nbytes([5000]) == kept
