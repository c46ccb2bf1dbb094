"""quantize_model and dequantize_model on module trees of every kind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import kbit
from kbit.nn import convert
from kbit.nn.base import QuantizedModule
from tests.nn.helpers import LABELS, bits_of, codes_of, config, fmt, same


class Block(nn.Module):
    def __init__(self, k: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(k, 2 * k)
        self.down = nn.Linear(2 * k, k, bias=False)
        self.norm = nn.LayerNorm(k)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Tiny(nn.Module):
    """A language model without transformers; `tied` ties the head to the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.extras = nn.ModuleDict({"probe": nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1))})
        self.lm_head = nn.Linear(64, 40, bias=False)
        self.register_buffer("steps", torch.zeros(3))
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.extras["probe"](x))


def quantized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]


INNER = [
    *(f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down")),
    "extras.probe.0",
]


@pytest.mark.parametrize("label", LABELS)
def test_a_tree(label):
    model = Tiny().eval()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(40, (2, 5))
    with torch.no_grad():
        before = model(ids)
        assert kbit.quantize_model(model, config(label)) is model
        after = model(ids)
    assert quantized(model) == INNER  # the head stays, and so does the embedding
    assert not any(module.training for module in model.modules())
    assert 0 < (after - before).norm() / before.norm() < (0.05 if label == "int8" else 0.4)
    for name in INNER:
        layer = model.get_submodule(name)
        assert layer.weight_format == fmt(label)
        assert same(layer.dequantize(), kbit.quantize(plain[f"{name}.weight"], fmt(label)).dequantize())
    assert same(model.layers[0].up.bias.detach(), plain["layers.0.up.bias"])


@pytest.mark.parametrize("label", LABELS)
def test_and_back(label):
    model = Tiny()
    model.layers[0].up.weight.requires_grad_(False)
    model.layers[1].eval()
    shapes = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    kbit.quantize_model(model, config(label, quantize_embeddings=True, skip_modules=[]))
    assert quantized(model) == ["embed", *INNER, "lm_head"]
    decoded = {name: model.get_submodule(name).dequantize() for name in quantized(model)}
    ids = torch.randint(40, (2, 5))
    model.eval()
    out = model(ids)
    assert kbit.dequantize_model(model) is model and not quantized(model)
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == shapes
    for name, weight in decoded.items():
        assert same(model.get_submodule(name).weight.detach(), weight)
        assert type(model.get_submodule(name)) in (nn.Linear, nn.Embedding)
    torch.testing.assert_close(model(ids), out, atol=1e-2 if label == "int8" else 1e-5, rtol=1e-2)
    assert set(modes) == {name for name, _ in model.named_modules()}


def test_modes_are_kept():
    model = Tiny()
    model.layers[0].eval()
    kbit.quantize_model(model, config("nf4"))
    assert not model.layers[0].up.training and model.layers[1].up.training
    kbit.dequantize_model(model)
    assert not model.layers[0].up.training and model.layers[1].up.training


@pytest.mark.parametrize(
    "skip, left",
    [
        ([], []),
        (None, ["lm_head"]),
        (["layers"], ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]),
        (["layers.1"], ["layers.1.up", "layers.1.down"]),
        (["up"], ["layers.0.up", "layers.1.up"]),
        (["layers.0.up", "probe"], ["layers.0.up", "extras.probe.0"]),
        (["*.down"], ["layers.0.down", "layers.1.down"]),
        (["layers.?.up"], ["layers.0.up", "layers.1.up"]),
        (["*.1"], ["layers.1.up", "layers.1.down"]),
        (["layers.[1-9]"], ["layers.1.up", "layers.1.down"]),
        (["own", "layer", "u"], []),  # parts of names match nothing
        (["*"], [*INNER, "lm_head"]),
    ],
)
def test_skip_list(skip, left):
    model = kbit.quantize_model(Tiny(), config("nf4", skip_modules=skip))
    assert set(quantized(model)) == {*INNER, "lm_head"} - set(left)


def test_root_module():
    x = torch.randn(3, 64)
    for root in (nn.Linear(64, 8), nn.Embedding(10, 64)):
        root.eval()
        cls = type(root)
        new = kbit.quantize_model(root, config("nf4", quantize_embeddings=True))
        assert isinstance(new, QuantizedModule) and not new.training
        new(x if cls is nn.Linear else torch.tensor([1]))
        back = kbit.dequantize_model(new)
        assert type(back) is cls and not back.training


def test_shared_module_is_converted_once():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(64, 64))})
    kbit.quantize_model(model, config("nf4"))
    assert model["a"] is model["b"][0] and len(quantized(model)) == 2
    kbit.dequantize_model(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.Linear


@pytest.mark.parametrize("label", LABELS)
def test_tied_linears_stay_tied(label):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    kbit.quantize_model(model, config(label))
    first, second = model[0].parts(), model[1].parts()
    assert all(first[name] is second[name] for name in first) and model[2].weight is not model[0].weight
    assert kbit.model_memory(model).quantized == 2 * fmt(label).nbytes((64, 64))
    x = torch.randn(2, 64)
    torch.testing.assert_close(model[0](x) - model[0].bias, model[1](x))  # the same codes, each with its own bias
    kbit.dequantize_model(model)
    assert model[0].weight is model[1].weight and model[2].weight is not model[0].weight


@pytest.mark.parametrize("label", LABELS)
def test_tied_head_follows_the_embedding(label):
    both = kbit.quantize_model(Tiny(tied=True), config(label, quantize_embeddings=True))
    assert quantized(both) == ["embed", *INNER, "lm_head"]
    assert both.embed.weight is both.lm_head.weight and both.embed.absmax is both.lm_head.absmax
    ids = torch.randint(40, (1, 4))
    assert both(ids).isfinite().all()
    assert torch.equal(both.lm_head.dequantize()[ids], both.embed(ids))
    both.half().float()
    assert both.embed.weight is both.lm_head.weight
    kbit.dequantize_model(both)
    assert both.embed.weight is both.lm_head.weight

    for options in ({}, {"skip_modules": []}, {"quantize_embeddings": True, "skip_modules": ["lm_head"]}):
        neither = kbit.quantize_model(Tiny(tied=True), config(label, **options))
        assert quantized(neither) == INNER and neither.embed.weight is neither.lm_head.weight
    skipped = kbit.quantize_model(Tiny(tied=True), config(label, quantize_embeddings=True, skip_modules=["embed"]))
    assert quantized(skipped) == INNER


def test_a_weight_that_something_else_uses_is_left_alone():
    """Or the codes and the original would both stay in memory, and drift apart."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.register_parameter("also", model[0].weight)
    kbit.quantize_model(model, config("nf4"))
    assert quantized(model) == ["1"] and model.also is model[0].weight


def test_shared_biases_are_no_tie():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    kbit.quantize_model(model, config("nf4"))
    assert quantized(model) == ["0", "1"] and model[1].bias is model[0].bias
    assert not torch.equal(model[0].dequantize(), model[1].dequantize())


def test_subclasses_and_attention_are_left_alone():
    class Mine(nn.Linear):
        pass

    class Row(nn.Embedding):
        pass

    model = nn.ModuleList([Mine(64, 64), Row(4, 64), nn.MultiheadAttention(64, 4), nn.Embedding(4, 64, max_norm=1.0)])
    model.append(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    model.append(nn.Bilinear(8, 8, 8))
    before = bits_of(model)
    kbit.quantize_model(model, config("nf4", quantize_embeddings=True, skip_modules=[]))
    assert not quantized(model) and bits_of(model) == before
    q = torch.randn(3, 2, 64)
    assert model[2](q, q, q)[0].shape == q.shape


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.nn.functional.silu])
def test_transformer_encoder(label, activation):
    """Its fused eval path would read linear1.weight as floating point."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    switches = [m.activation_relu_or_gelu for m in model.layers], model.use_nested_tensor
    x = torch.randn(2, 5, 64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected, masked = model(x), model(x, src_key_padding_mask=padding)
        kbit.quantize_model(model, config(label))
        assert len(quantized(model)) == 4
        for out, want in ((model(x), expected), (model(x, src_key_padding_mask=padding), masked)):
            keep = ~padding if want is masked else torch.ones_like(padding)
            assert (out - want)[keep].norm() / want[keep].norm() < (0.05 if label == "int8" else 0.2)
        grad_path = model(x.clone())
    with torch.enable_grad():
        torch.testing.assert_close(model(x.clone().requires_grad_()).detach(), grad_path)
    kbit.dequantize_model(model)
    assert ([m.activation_relu_or_gelu for m in model.layers], model.use_nested_tensor) == switches
    with torch.no_grad():
        assert model(x, src_key_padding_mask=padding).shape[0] == 2


def test_hooks_survive_both_ways():
    model = nn.Sequential(nn.Linear(64, 64))
    calls = []
    handles = [
        model[0].register_forward_pre_hook(lambda m, args, kwargs: calls.append("pre"), with_kwargs=True),
        model[0].register_forward_hook(lambda m, args, kwargs, out: calls.append("post"), with_kwargs=True),
        model[0].register_forward_hook(lambda m, args, out: calls.append("always"), always_call=True),
        model[0].register_full_backward_hook(lambda m, gi, go: calls.append("back")),
        model[0].register_full_backward_pre_hook(lambda m, go: calls.append("prebk")),
    ]

    def run() -> list[str]:
        calls.clear()
        model(torch.randn(1, 64, requires_grad=True)).sum().backward()
        return sorted(calls)

    everything = run()
    assert everything == ["always", "back", "post", "pre", "prebk"]
    for change in (lambda: kbit.quantize_model(model, config("nf4")), lambda: kbit.dequantize_model(model)):
        change()
        assert run() == everything
    kbit.quantize_model(model, config("nf4"))
    for handle in handles:
        handle.remove()
    assert run() == []


def test_a_quantized_model_is_left_alone():
    model = kbit.quantize_model(Tiny(), config("nf4"))
    layers = [model.get_submodule(name) for name in INNER]
    before = bits_of(model)
    kbit.quantize_model(model, config("int8"))
    assert [model.get_submodule(name) for name in INNER] == layers and bits_of(model) == before
    kbit.quantize_model(model, config("int8", skip_modules=[]))  # only what is left is converted
    assert model.lm_head.weight_format == fmt("int8") and model.layers[0].up.weight_format == fmt("nf4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_change_nothing(bad):
    model = Tiny()
    with torch.no_grad():
        model.extras["probe"][0].weight[3, 4] = bad
    before, modules = bits_of(model), list(model.modules())
    with pytest.raises(ValueError, match="tensor 'extras.probe.0.weight' holds 1 values"):
        kbit.quantize_model(model, config("nf4"))
    assert bits_of(model) == before and list(model.modules()) == modules
    kbit.quantize_model(model, config("nf4", skip_modules=["probe"]))  # the remedy that the error names


def test_meta_and_other_dtypes_change_nothing():
    with torch.device("meta"):
        model = Tiny()
    with pytest.raises(ValueError, match="layers.0.up.weight.*meta device.*load the weights"):
        kbit.quantize_model(model, config("nf4"))
    assert not quantized(model)
    model = Tiny()
    model.extras["probe"][0].weight = nn.Parameter(torch.ones(64, 64).to(torch.float8_e4m3fn), requires_grad=False)
    before = list(model.modules())
    with pytest.raises(TypeError, match="extras.probe.0.weight.*float8"):
        kbit.quantize_model(model, config("nf4"))
    assert list(model.modules()) == before


def test_config_must_be_one():
    with pytest.raises(TypeError, match="config must be a KbitConfig, got dict"):
        kbit.quantize_model(Tiny(), {"bits": 4})


@pytest.mark.parametrize("label", ["nf4", "int8"])
def test_weights_are_freed_one_by_one(label):
    """Peak: at most one floating point weight exists beside its codes, and none afterwards."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    alive = [weakref.ref(layer.weight) for layer in model]
    counts = []
    original = convert.empty_like

    def counting(*args, **kwargs):
        counts.append(sum(ref() is not None for ref in alive))
        return original(*args, **kwargs)

    convert.empty_like = counting
    gc.disable()  # freed by reference counts alone, without waiting for a collection
    try:
        kbit.quantize_model(model, config(label))
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
        convert.empty_like = original
    assert counts == [6, 5, 4, 3, 2, 1]


def test_nothing_is_left_after_the_model():
    model = kbit.quantize_model(Tiny(), config("nf4", quantize_embeddings=True))
    model(torch.randint(40, (1, 4))).sum().backward()
    alive = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("label", LABELS)
def test_after_a_cast_the_dequantized_model_works_in_that_dtype(label):
    model = kbit.quantize_model(Tiny(tied=True), config(label, quantize_embeddings=True)).bfloat16()
    kbit.dequantize_model(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randint(40, (1, 4))).dtype == torch.bfloat16
    model = kbit.quantize_model(Tiny().bfloat16(), config(label))
    assert kbit.dequantize_model(model, torch.float32).layers[0].up.weight.dtype == torch.float32


def test_embedding_options_come_back():
    model = nn.Sequential(nn.Embedding(10, 64, padding_idx=3, scale_grad_by_freq=True, sparse=True))
    kbit.quantize_model(model, config("nf4", quantize_embeddings=True))
    back = kbit.dequantize_model(model)[0]
    assert back.padding_idx == 3 and back.scale_grad_by_freq and back.sparse


def test_converted_in_inference_mode_then_trained():
    with torch.inference_mode():
        model = kbit.quantize_model(nn.Sequential(nn.Linear(64, 8)), config("nf4"))
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    with torch.inference_mode():
        kbit.dequantize_model(model)
    model(x).sum().backward()


@pytest.mark.parametrize("label", LABELS)
def test_model_memory(label):
    model = Tiny(tied=True)
    total = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    memory = kbit.model_memory(model)
    assert memory == total and memory.quantized == 0 and memory.buffers == 12 and memory.other == total - 12
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in INNER]
    kbit.quantize_model(model, config(label, quantize_embeddings=True))
    memory = kbit.model_memory(model)
    assert memory.quantized == sum(fmt(label).nbytes(shape) for shape in [*shapes, (40, 64)])
    assert memory == memory.quantized + memory.other + memory.buffers
    assert memory.other == sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    model.half()
    assert kbit.model_memory(model).quantized == memory.quantized
    assert kbit.model_memory(model).other == memory.other // 2
    with torch.device("meta"):
        assert kbit.model_memory(nn.Linear(64, 64)) == 4 * (64 * 64 + 64)


def test_two_parameters_over_one_storage_stay_one() -> None:
    embedding = nn.Embedding(32, 64)
    head = nn.Linear(64, 32, bias=False)
    head.weight = nn.Parameter(embedding.weight.data)
    model = nn.Sequential(embedding, head)
    kbit.quantize_model(model, kbit.KbitConfig(bits=4, quantize_embeddings=True, skip_modules=[]))
    assert model[0].weight is model[1].weight
    assert kbit.model_memory(model) == model[0].nbytes


def test_routers_stay_and_embedding_subclasses_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 8

    layer = nn.ModuleDict({"gate": nn.Linear(64, 4), "experts": nn.ModuleList([nn.Linear(64, 64)])})
    model = nn.ModuleDict({"embed": Scaled(10, 64), "moe": layer})
    with caplog.at_level("WARNING", logger="kbit"):
        kbit.quantize_model(model, kbit.KbitConfig(bits=4, quantize_embeddings=True))
    assert type(layer["gate"]) is nn.Linear and isinstance(layer["experts"][0], kbit.Linear4bit)
    assert type(model["embed"]) is Scaled
    assert [r.getMessage() for r in caplog.records].count(
        "embed is a Scaled, not a plain nn.Embedding, and is not quantized"
    ) == 1


def test_nothing_to_quantize_is_said(caplog):
    model = kbit.quantize_model(nn.Sequential(nn.Linear(64, 8)), kbit.KbitConfig(bits=4))
    assert not caplog.text
    before = codes_of(model[0])
    kbit.quantize_model(model, kbit.KbitConfig(bits=8))
    assert "nothing in this Sequential was quantized: its layers are quantized already" in caplog.text
    assert type(model[0]) is kbit.Linear4bit and codes_of(model[0]) == before
    caplog.clear()
    kbit.quantize_model(nn.Sequential(nn.ReLU()))
    assert "no linear layers but those that are skipped" in caplog.text
