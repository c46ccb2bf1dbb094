"""Layers that change after quantizing: tables that are resized, and floating point layers in the place of codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kbit

pytestmark = pytest.mark.transformers
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOKENS = torch.arange(3, 15)[None]


def llama(folder: Path, tied: bool, hidden: int = 64) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=hidden, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, **config: Any) -> Any:
    quantization = {"quantization_config": kbit.KbitConfig(**config)} if config else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **quantization)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("hidden", [64, 48])
def test_quantized_tables_resize(tmp_path: Path, bits: int, tied: bool, hidden: int) -> None:
    model = load(
        llama(tmp_path / "m", tied, hidden), bits=bits, double_quant=False, quantize_embeddings=True, skip_modules=[]
    )
    before = logits(model)
    table = model.resize_token_embeddings(101, pad_to_multiple_of=8)
    assert type(table) is (kbit.nn.Embedding4bit if bits == 4 else kbit.nn.Embedding8bit)
    assert table is model.get_input_embeddings() and table.num_embeddings == model.config.vocab_size == 104
    assert (model.lm_head.weight is table.weight) == tied
    # Without double quantization, quantizing decoded values again gives the same codes: old tokens stay what they were.
    torch.testing.assert_close(logits(model)[..., :99], before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "resized")
    assert torch.equal(logits(load(tmp_path / "resized")), logits(model))
    assert model.resize_token_embeddings(99).num_embeddings == 99
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_resizing_without_a_quantized_table_and_without_a_size(tmp_path: Path) -> None:
    model = load(llama(tmp_path, False), bits=4)
    assert type(model.resize_token_embeddings(120)) is torch.nn.Embedding
    assert logits(model).shape[-1] == 120
    model = load(tmp_path, bits=4, quantize_embeddings=True)
    table = model.get_input_embeddings()
    assert model.resize_token_embeddings() is table


@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save_trains_a_float_copy_of_a_quantized_module(tmp_path: Path, tied: bool) -> None:
    quantized = load(llama(tmp_path / "m", tied), bits=4, quantize_embeddings=True, skip_modules=[])
    quantized.save_pretrained(tmp_path / "base")
    before = logits(quantized)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(kbit.prepare_for_training(quantized), config)
    torch.testing.assert_close(logits(model), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="wrapped by a PEFT adapter"):
        model.get_base_model().save_pretrained(tmp_path / "wrapped")

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), trained)

    merged = again.merge_and_unload()
    assert type(merged.lm_head) is torch.nn.Linear and type(merged.model.embed_tokens) is kbit.nn.Embedding4bit
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert type(loaded.model.layers[0].self_attn.q_proj) is kbit.nn.Linear4bit


@pytest.mark.parametrize("bits", [4, 8])
def test_dora_on_a_quantized_embedding_equals_dora_on_its_values(tmp_path: Path, bits: int) -> None:
    options = {"bits": bits, "quantize_embeddings": True, "int8_activations": False if bits == 8 else None}
    quantized = load(llama(tmp_path, False), **options)
    plain = kbit.dequantize_model(load(tmp_path, **options))
    results = []
    for base in (quantized, plain):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], use_dora=True)
        model = peft.get_peft_model(base, config)
        for name, parameter in model.named_parameters():  # LoRA starts without effect
            if parameter.requires_grad and "magnitude" not in name:
                parameter.data = 0.05 * torch.randn_like(parameter)
        out = model(TOKENS, labels=TOKENS)
        out.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        merged = logits(kbit.merge_adapters(model))
        torch.testing.assert_close(merged, out.logits.detach(), rtol=1e-4, atol=1e-5)
        results.append([out.logits.detach(), *gradients])
    assert len(results[0]) == len(results[1]) > 4
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_merging_keeps_the_adapters_of_layers_that_are_not_quantized(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(load(llama(tmp_path, False), bits=4), config)
    assert type(model.get_base_model().lm_head.base_layer) is torch.nn.Linear
    before = logits(model)
    torch.testing.assert_close(logits(kbit.merge_adapters(model)), before, rtol=1e-4, atol=1e-5)


def test_trainable_tokens_of_a_quantized_table_are_refused(tmp_path: Path) -> None:
    model = load(llama(tmp_path, False), bits=4, quantize_embeddings=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match="trainable_token_indices needs a floating point table"):
        peft.get_peft_model(model, config)
