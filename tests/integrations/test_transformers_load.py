"""Quantizing while loading, saving and loading again: five architectures, both widths, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kbit
from kbit.formats import Format
from tests.integrations import tiny_models as tiny

CONFIGS = {
    "nf4": dict(bits=4),
    "nf4-plain": dict(bits=4, double_quant=False),
    "fp4-128": dict(bits=4, format="fp4", block_size=128),
    "int8": dict(bits=8),
}
# Layers that must be quantized and layers that must not, with the default skip.
EXPECTED = {
    "llama": (["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"], ["lm_head", "model.embed_tokens"]),
    "gpt2": (["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"], ["lm_head", "transformer.wte"]),
    "bert": (["bert.encoder.layer.0.attention.self.query"], ["cls.predictions.decoder"]),
    "opt": (["model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.fc2"], ["lm_head"]),
    "t5": (
        ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.2.DenseReluDense.wi"],
        ["lm_head", "encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo", "shared"],
    ),
}


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("architecture", list(tiny.MODELS))
def test_quantizes_while_loading_and_round_trips_twice(architecture: str, name: str, tmp_path: Path) -> None:
    config = kbit.KbitConfig(**CONFIGS[name])
    source = tiny.MODELS[architecture]()
    path = tiny.save(source, tmp_path / "source", torch.bfloat16)
    model = tiny.load(path, config)

    layers = tiny.quantized(model)
    inside, outside = EXPECTED[architecture]
    for layer in inside:
        assert layers[layer].weight_format == config.weight_format
    for layer in outside:
        assert isinstance(model.get_submodule(layer), (nn.Linear, nn.Embedding)) and layer not in layers

    # What was stored is what quantizing the checkpoint's own tensors gives, in their orientation.
    for layer, module in layers.items():
        weight = source.get_submodule(layer).weight.detach()
        weight = weight.t() if type(source.get_submodule(layer)).__name__ == "Conv1D" else weight
        expected = kbit.quantize(weight, config.weight_format)
        assert torch.equal(module.dequantize(), expected.dequantize()), layer
        assert module.dequantize().dtype == torch.bfloat16

    reference = tiny.logits(source)
    first = tiny.logits(model)
    assert first.dtype == torch.bfloat16 and torch.isfinite(first).all()
    error = (first - reference).float().norm() / reference.float().norm()
    assert 0 < error < (0.05 if config.bits == 8 else 0.5)

    for step in ("once", "twice"):
        model.save_pretrained(tmp_path / step)
        again = tiny.load(tmp_path / step)
        tiny.assert_same_bits(model, again)
        assert torch.equal(tiny.logits(again), first)
        assert again.config.quantization_config.to_dict() == config.to_dict()
        model = again


@pytest.mark.parametrize("bits", [4, 8])
def test_sharded_saves(bits: int, tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "source", torch.bfloat16, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    model = tiny.load(path, kbit.KbitConfig(bits=bits))
    model.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    again = tiny.load(tmp_path / "out")
    tiny.assert_same_bits(model, again)
    again.save_pretrained(tmp_path / "out")  # over the very files that it was loaded from
    tiny.assert_same_bits(model, tiny.load(tmp_path / "out"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", ["auto", torch.float32, torch.float16])
def test_dtypes(stored: torch.dtype, wanted: Any, bits: int, tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(num_hidden_layers=1), tmp_path / "source", stored)
    model = tiny.load(path, kbit.KbitConfig(bits=bits), dtype=wanted)
    dtype = stored if wanted == "auto" else wanted
    assert model.dtype == dtype and tiny.logits(model).dtype == dtype
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.dequantize().dtype == dtype
    model.save_pretrained(tmp_path / "out")
    again = tiny.load(tmp_path / "out", dtype=wanted)
    tiny.assert_same_bits(model, again)
    assert again.model.layers[0].self_attn.q_proj.dequantize().dtype == dtype


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "opt", "t5"])
def test_quantize_model_then_save(architecture: str, bits: int, tmp_path: Path) -> None:
    model = tiny.load(tiny.save(tiny.MODELS[architecture](), tmp_path / "source", torch.bfloat16))
    kbit.quantize_model(model, kbit.KbitConfig(bits=bits))
    model.save_pretrained(tmp_path / "out")
    again = tiny.load(tmp_path / "out")
    tiny.assert_same_bits(model, again)
    assert torch.equal(tiny.logits(model), tiny.logits(again))
    assert again.config.quantization_config.bits == bits
    kbit.dequantize_model(model)
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "float")
    assert not tiny.quantized(tiny.load(tmp_path / "float"))


def test_loading_equals_quantize_model(tmp_path: Path) -> None:
    source = tiny.llama()
    path = tiny.save(source, tmp_path, torch.bfloat16)
    for bits in (4, 8):
        config = kbit.KbitConfig(bits=bits)
        tiny.assert_same_bits(tiny.load(path, config), kbit.quantize_model(tiny.load(path), config))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", list(tiny.MODELS))
def test_tied_tables_are_quantized_and_saved_once(architecture: str, bits: int, tmp_path: Path) -> None:
    from safetensors import safe_open

    config = kbit.KbitConfig(bits=bits, quantize_embeddings=True)
    overrides = {"tie_word_embeddings": True} if architecture == "llama" else {}
    path = tiny.save(tiny.MODELS[architecture](**overrides), tmp_path / "source", torch.bfloat16)
    model = tiny.load(path, config)
    first = tiny.logits(model)
    for step in ("loaded", "reloaded"):
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(head, (kbit.Linear4bit, kbit.Linear8bit))
        assert isinstance(table, (kbit.Embedding4bit, kbit.Embedding8bit))
        assert all(head.parts()[part] is table.parts()[part] for part in table.parts()), step
        if getattr(head, "bias", None) is not None:
            assert head.bias.shape == (tiny.VOCABULARY,)
        model.save_pretrained(tmp_path / step)
        with safe_open(tmp_path / step / "model.safetensors", framework="pt") as file:
            keys = list(file.keys())
        modules = model.named_modules(remove_duplicate=False)
        names = [name for name, module in modules if getattr(module, "weight", None) is table.weight]
        saved = [name for name in names if f"{name}.weight" in keys]
        assert len(names) > 1 and len(saved) == 1
        assert {key for name in names for key in keys if key.startswith(f"{name}.") and not key.endswith("bias")} == {
            f"{saved[0]}.{part}" for part in table.parts()
        }
        again = tiny.load(tmp_path / step)
        tiny.assert_same_bits(model, again)
        assert torch.equal(tiny.logits(again), first)
        again.tie_weights()
        assert torch.equal(tiny.logits(again), first)
        model = again


def test_quantize_model_with_tied_tables_then_save(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path / "source", torch.bfloat16)
    for bits in (4, 8):
        model = tiny.load(path)
        kbit.quantize_model(model, kbit.KbitConfig(bits=bits, quantize_embeddings=True))
        model.save_pretrained(tmp_path / str(bits))
        again = tiny.load(tmp_path / str(bits))
        tiny.assert_same_bits(model, again)
        assert torch.equal(tiny.logits(model), tiny.logits(again))


def test_skip_modules(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "source", torch.bfloat16)
    everything = tiny.load(path, kbit.KbitConfig(bits=4, skip_modules=[]))
    assert "lm_head" in tiny.quantized(everything)
    some = tiny.load(path, kbit.KbitConfig(bits=4, skip_modules=["lm_head", "*.down_proj", "layers.0"]))
    assert {name.split(".")[2] for name in tiny.quantized(some)} == {"1"}
    assert not any(name.endswith("down_proj") for name in tiny.quantized(some))
    for step, model in {"everything": everything, "some": some}.items():
        model.save_pretrained(tmp_path / step)
        tiny.assert_same_bits(model, tiny.load(tmp_path / step))
    # T5 must keep `wo` in floating point whatever is asked: its forward casts the input to that weight's dtype.
    t5 = tiny.load(tiny.save(tiny.t5(), tmp_path / "t5"), kbit.KbitConfig(bits=4, skip_modules=[]))
    assert not any(name.endswith(".wo") for name in tiny.quantized(t5))
    assert torch.isfinite(tiny.logits(t5)).all()


def test_a_dict_and_a_checkpoint_config_work_like_the_class(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "source", torch.bfloat16)
    by_class = tiny.load(path, kbit.KbitConfig(bits=4))
    by_dict = tiny.load(path, {"quant_method": "kbit", "bits": 4})
    tiny.assert_same_bits(by_class, by_dict)
    by_class.save_pretrained(tmp_path / "q")
    with pytest.warns(UserWarning, match="quantization_config"):  # transformers: the checkpoint's own one is used
        again = tiny.load(tmp_path / "q", kbit.KbitConfig(bits=4))
    tiny.assert_same_bits(by_class, again)
    with pytest.raises(ValueError, match="unknown keys"):
        tiny.load(path, {"quant_method": "kbit", "bits": 4, "blocksize": 64})


def test_settings_of_the_products_are_changed_when_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "source", torch.bfloat16)
    stored = tiny.load(path, kbit.KbitConfig(bits=8, outlier_threshold=4.0))
    stored.save_pretrained(tmp_path / "8")
    asked = kbit.KbitConfig(bits=8, int8_activations=True, compute_dtype=torch.float16)
    model = tiny.load(tmp_path / "8", asked)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.outlier_threshold, layer.int8_activations, layer.compute_dtype) == (4.0, True, torch.float16)
    by_dict = tiny.load(tmp_path / "8", {"quant_method": "kbit", "bits": 8, "outlier_threshold": 6.0})
    assert by_dict.model.layers[0].mlp.up_proj.outlier_threshold == 6.0
    tiny.assert_same_bits(stored, model)
    model.save_pretrained(tmp_path / "again")
    assert tiny.load(tmp_path / "again").model.layers[0].mlp.up_proj.int8_activations is True

    tiny.load(path, kbit.KbitConfig(bits=4)).save_pretrained(tmp_path / "4")
    model = tiny.load(tmp_path / "4", kbit.KbitConfig(compute_dtype="float32"))
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    with pytest.raises(ValueError, match="bits=4"):
        tiny.load(tmp_path / "4", kbit.KbitConfig(bits=8, outlier_threshold=3.0))


@pytest.mark.parametrize("asked", [{"bits": 8}, {"format": "fp4"}, {"block_size": 128}, {"double_quant": False}])
def test_another_storage_than_the_checkpoints_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    config = kbit.KbitConfig(bits=4)
    tiny.load(tiny.save(tiny.llama(), tmp_path / "source"), config).save_pretrained(tmp_path / "q")
    ((name, value),) = asked.items()
    with pytest.raises(ValueError, match=f"stored with {name}={getattr(config, name)!r} .* asks for {value!r}"):
        tiny.load(tmp_path / "q", kbit.KbitConfig(**asked))


def test_the_hugging_face_surface(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path, torch.bfloat16)
    model = tiny.load(path, kbit.KbitConfig(bits=4))
    assert model.is_quantized and model.quantization_method == "kbit"
    assert not hasattr(model, "is_loaded_in_4bit") and not hasattr(model, "is_loaded_in_8bit")
    quantizer = model.hf_quantizer
    assert quantizer.is_serializable() and quantizer.is_trainable and quantizer.is_compileable
    stored = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert model.get_memory_footprint() == stored
    fmt = Format.parse("nf4")
    for layer in tiny.quantized(model).values():
        assert layer.nbytes == fmt.nbytes(layer.weight_shape)

    ids = torch.arange(4)[None]
    before = tiny.logits(model)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 8)
    assert torch.equal(tiny.logits(model.to("cpu")), before)
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.dequantize()
    model.to(torch.float16)
    assert tiny.logits(model).dtype == torch.float16 and torch.equal(layer.dequantize(), weight)
    model.bfloat16()

    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.float().square().mean().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0
    assert not any(p.requires_grad for m in tiny.quantized(model).values() for p in m.parts().values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", list(tiny.MODELS))
def test_dequantize(architecture: str, bits: int, tmp_path: Path) -> None:
    path = tiny.save(tiny.MODELS[architecture](), tmp_path / "source", torch.float16)
    model = tiny.load(path, kbit.KbitConfig(bits=bits, outlier_threshold=0.0))
    weights = {name: layer.dequantize() for name, layer in tiny.quantized(model).items()}
    expected = tiny.logits(model)
    model = model.dequantize()
    assert not tiny.quantized(model) and weights
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        restored = layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight
        assert torch.equal(restored, weight) and restored.dtype == torch.float16
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    difference = (tiny.logits(model) - expected).float().norm() / expected.float().norm()
    assert difference < 0.02
    model.save_pretrained(tmp_path / "out")
    tiny.assert_same_bits(model, tiny.load(tmp_path / "out"))


def test_other_heads_and_backbones_load_from_a_kbit_checkpoint(tmp_path: Path) -> None:
    """A backbone takes its part; a new head is new: floating point, trainable, and saved and loaded as such."""
    import transformers

    causal = tiny.load(tiny.save(tiny.llama(), tmp_path / "source"), kbit.KbitConfig(bits=4))
    causal.save_pretrained(tmp_path / "q")
    backbone = tiny.load(tmp_path / "q", model_class=transformers.LlamaModel)
    tiny.assert_same_bits(causal.model, backbone)
    classifier = tiny.load(tmp_path / "q", model_class=transformers.LlamaForSequenceClassification, num_labels=3)
    assert type(classifier.score) is nn.Linear and classifier.score.weight.requires_grad
    tiny.assert_same_bits(causal.model, classifier.model)

    masked = tiny.load(tiny.save(tiny.bert(), tmp_path / "bert"), kbit.KbitConfig(bits=4))
    masked.save_pretrained(tmp_path / "bert4")
    pooled = tiny.load(tmp_path / "bert4", model_class=transformers.BertModel)  # the pooler is new
    assert type(pooled.pooler.dense) is nn.Linear and torch.isfinite(pooled.pooler.dense.weight).all()
    assert 0.01 < pooled.pooler.dense.weight.std() < 0.03
    pooled.save_pretrained(tmp_path / "pooled")
    tiny.assert_same_bits(pooled, tiny.load(tmp_path / "pooled"))
    fresh = tiny.load(tmp_path / "bert", kbit.KbitConfig(bits=8, skip_modules=[]), model_class=transformers.BertModel)
    assert type(fresh.pooler.dense) is nn.Linear
    fresh.save_pretrained(tmp_path / "fresh")
    tiny.assert_same_bits(fresh, tiny.load(tmp_path / "fresh"))


def test_adapters_that_transformers_manages_are_saved_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny.load(tiny.save(tiny.llama(), tmp_path / "source", torch.bfloat16), kbit.KbitConfig(bits=4))
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert [file.name for file in (tmp_path / "adapter").glob("*.safetensors")] == ["adapter_model.safetensors"]
