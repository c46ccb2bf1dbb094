"""quantize_model on transformers' own module trees: Conv1D, tied heads, modules kept in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbit
from kbit.nn.base import QuantizedModule
from tests.nn.helpers import LABELS, bits_of, config, same

transformers = pytest.importorskip("transformers")


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    ).eval()


def llama(**options):
    settings = dict(vocab_size=96, hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, **options)).eval()


def t5():
    settings = dict(vocab_size=96, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)).eval()


def drift(model: nn.Module, change, **inputs) -> float:
    with torch.no_grad():
        before = model(**inputs).logits
        change(model)
        return float((model(**inputs).logits - before).norm() / before.norm())


@pytest.mark.parametrize("label", LABELS)
def test_gpt2_conv1d(label):
    model, ids = gpt2(), torch.randint(96, (2, 20))
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    limit = 0.05 if label == "int8" else 0.4
    assert 0 < drift(model, lambda m: kbit.quantize_model(m, config(label)), input_ids=ids) < limit
    names = {f"transformer.h.{i}.{p}" for i in (0, 1) for p in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert quantized(model) == names and model.lm_head.weight is model.transformer.wte.weight
    for name in names:
        layer = model.get_submodule(name)
        assert layer.weight_shape == original[f"{name}.weight"].t().shape and layer.weight.is_contiguous()
        assert same(layer.bias.detach(), original[f"{name}.bias"])
        assert same(layer.dequantize(), kbit.quantize(original[f"{name}.weight"].t(), layer.weight_format).dequantize())
    assert drift(model, kbit.dequantize_model, input_ids=ids) < 0.02
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in original.items()}
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("skip", [None, []])
def test_llama_head_rules(tied, embeddings, skip):
    model, ids = llama(tie_word_embeddings=tied), torch.randint(96, (1, 8))
    change = lambda m: kbit.quantize_model(m, config("nf4", quantize_embeddings=embeddings, skip_modules=skip))  # noqa: E731
    assert drift(model, change, input_ids=ids) < 0.5
    names = quantized(model)
    assert len(names - {"lm_head", "model.embed_tokens"}) == 14
    assert ("model.embed_tokens" in names) == embeddings
    assert ("lm_head" in names) == (embeddings if tied else skip == [])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_model_that_was_untied_by_hand_stays_untied():
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn(96, 64))
    head, table = model.lm_head.weight.detach().clone(), model.model.embed_tokens.weight.detach().clone()
    kbit.quantize_model(model, config("int8", quantize_embeddings=True, skip_modules=[]))
    assert same(model.lm_head.dequantize(), kbit.quantize(head, "int8").dequantize())
    assert same(model.model.embed_tokens.dequantize(), kbit.quantize(table, "int8").dequantize())


@pytest.mark.parametrize("label", ["nf4", "int8"])
def test_t5_keeps_wo(label):
    """T5 casts its input to the dtype of wo.weight, which therefore must stay floating point."""
    model, ids = t5(), torch.randint(1, 96, (2, 8))
    change = lambda m: kbit.quantize_model(m, config(label))  # noqa: E731
    assert 0 < drift(model, change, input_ids=ids, decoder_input_ids=ids) < 0.5
    names = quantized(model)
    assert names and not any(name.endswith(".wo") for name in names) and "lm_head" not in names
    assert model.encoder.embed_tokens.weight is model.shared.weight
    everything = kbit.quantize_model(t5(), config(label, quantize_embeddings=True))
    assert everything.encoder.embed_tokens.weight is everything.decoder.embed_tokens.weight is everything.shared.weight
    assert everything(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


def test_classification_heads_are_skipped():
    settings = dict(vocab_size=96, hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**settings)).eval()
    kbit.quantize_model(model, config("nf4"))
    names = quantized(model)
    assert "classifier" not in names and "bert.pooler.dense" in names
    assert model(torch.randint(96, (2, 5))).logits.isfinite().all()


@pytest.mark.parametrize("label", LABELS)
def test_generation_and_training_through_a_quantized_llama(label):
    model, ids = kbit.quantize_model(llama(), config(label)), torch.randint(96, (1, 5))
    assert model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).shape == (1, 11)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.isfinite().all()
    assert all(p.grad is None for p in model.model.layers[0].self_attn.q_proj.parts().values())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    other = kbit.quantize_model(llama(), config(label))
    other.load_state_dict(state)
    assert bits_of(other) == bits_of(model)
