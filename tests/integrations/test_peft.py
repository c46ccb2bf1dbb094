"""Native QLoRA: PEFT adapters on quantized layers, their gradients, merging, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import kbit
from kbit.nn.base import QuantizedModule

peft = pytest.importorskip("peft", reason="the peft extra is not installed")
transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

FORMATS = ["nf4", "nf4-plain", "fp4", "int8"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12) * 3 % 97


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,  # not a multiple of 64: down_proj has the flat layout
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def quantized(fmt: str, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    return kbit.quantize_model(tiny_llama(dtype), kbit.KbitConfig.from_format(fmt, **options))


def lora(**options: object):
    return peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})


def randomize(model: nn.Module, scale: float = 0.05) -> None:
    """Give every adapter a non-zero effect: LoRA starts with B = 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale


def adapter_layers(model: nn.Module):
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_gradients_equal_those_through_the_dequantized_weight(fmt: str, options: dict) -> None:
    # 8 tokens: int8 activations (from 9 on) would not be those of the oracle, which is the dequantized weight.
    model = peft.get_peft_model(quantized(fmt), lora(**options)).double()
    randomize(model)
    oracle = copy.deepcopy(model)
    for layer in adapter_layers(oracle):
        layer.base_layer = kbit.dequantize_model(layer.base_layer, torch.float64)
    oracle = kbit.dequantize_model(oracle, torch.float64)
    ids = IDS[:1, :8]
    model(input_ids=ids, labels=ids).loss.backward()
    oracle(input_ids=ids, labels=ids).loss.backward()
    expected = dict(oracle.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # DoRA's norm reads the weight in the dtype that was quantized (fp32).
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-9)
            compared += 1
    assert compared >= 12


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_quantize_of_dequantized_plus_delta_to_the_bit(fmt: str, dtype: torch.dtype) -> None:
    model = peft.get_peft_model(quantized(fmt, dtype), lora())
    randomize(model)
    expected = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            weight = layer.base_layer.dequantize().float() + layer.get_delta_weight("default")
            expected[name] = kbit.quantize(weight, layer.base_layer.weight_format)
    model.merge_adapter()
    assert len(expected) == 6
    for name, q in expected.items():
        merged = model.get_submodule(name).base_layer.quantized_weight()
        assert merged.dtype == dtype
        for part, tensor in q.tensors().items():
            assert torch.equal(merged.tensors()[part], tensor), f"{name} {part}"


@pytest.mark.parametrize("fmt", FORMATS)
def test_unmerge_restores_the_codes_to_the_bit(fmt: str) -> None:
    model = peft.get_peft_model(quantized(fmt), lora(lora_bias=False))
    randomize(model)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    model.merge_adapter()
    assert any(not torch.equal(part, before[name]) for name, part in model.state_dict().items())
    model.unmerge_adapter()
    for name, part in model.state_dict().items():
        assert torch.equal(part, before[name]), name


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_merge_twice_and_safe_merge(fmt: str) -> None:
    model = peft.get_peft_model(quantized(fmt), lora())
    randomize(model)
    layer = adapter_layers(model)[0]
    before = layer.base_layer.weight.clone()
    layer.merge(safe_merge=True)
    merged = layer.base_layer.weight.clone()
    with pytest.warns(UserWarning):
        layer.merge()  # merged already: nothing happens
    assert torch.equal(layer.base_layer.weight, merged)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert isinstance(layer.base_layer, QuantizedModule)


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_into_the_dequantized_base_keeps_the_logits(fmt: str, dtype: torch.dtype) -> None:
    """Also after an evaluation on the CPU, which corrupts the merge in bitsandbytes 0.50."""
    model = peft.get_peft_model(quantized(fmt, dtype, outlier_threshold=6.0), lora())
    randomize(model)
    ids = IDS[:1, :8]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.float()
        merged = kbit.merge_adapters(model)
        assert not any(isinstance(m, QuantizedModule) for m in merged.modules())
        assert all(p.dtype == dtype for p in merged.parameters())
        assert not hasattr(merged.config, "quantization_config")
        after = merged(input_ids=ids).logits.float()
    scale = logits.abs().max()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (after - logits).abs().max() <= tolerance * scale


def test_merge_and_unload_stays_quantized() -> None:
    model = peft.get_peft_model(quantized("nf4"), lora())
    randomize(model)
    base = kbit.merge_adapters(model, dequantize=False)
    kinds = [type(m).__name__ for m in base.modules()]
    assert kinds.count("Linear4bit") == 14 and not any(hasattr(m, "lora_A") for m in base.modules())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian"])
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_initialisations_that_read_the_weight(init: str, fmt: str) -> None:
    base = quantized(fmt)
    reference = base(input_ids=IDS[:1, :8]).logits
    model = peft.get_peft_model(base, lora(init_lora_weights=init))
    assert all(isinstance(layer.base_layer, QuantizedModule) for layer in adapter_layers(model))
    logits = model(input_ids=IDS[:1, :8]).logits
    assert logits.isfinite().all()
    if init in ("pissa", "pissa_niter_4", "olora"):
        # The adapter took the principal part out of the base and holds it: the sum is still near the weight.
        assert adapter_layers(model)[0].lora_B["default"].weight.abs().max() > 0
    error = (logits - reference).norm() / reference.norm()
    assert error < (0.35 if init != "gaussian" else 1e-6), error


def test_pissa_leaves_a_smaller_residual() -> None:
    """PiSSA takes the largest singular directions: the residual that is quantized has a smaller norm."""
    base = quantized("nf4")
    before = base.model.layers[0].self_attn.q_proj.dequantize().norm()
    model = peft.get_peft_model(base, lora(init_lora_weights="pissa"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.dequantize().norm() < before
    total = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    assert (total - kbit.quantize(total, "nf4").dequantize()).norm() < before  # finite and of the weight's size


def test_quantize_after_wrapping_leaves_adapters_alone() -> None:
    """LoftQ and friends on the full-precision model first, then quantize: only base layers are packed."""
    model = peft.get_peft_model(tiny_llama(), lora(init_lora_weights="pissa"))
    kbit.quantize_model(model, kbit.KbitConfig(bits=4))
    for layer in adapter_layers(model):
        assert isinstance(layer.base_layer, kbit.Linear4bit)
        assert type(layer.lora_A["default"]) is nn.Linear and type(layer.lora_B["default"]) is nn.Linear
    randomize(model)
    model.merge_adapter()
    model.unmerge_adapter()


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_brings_the_quantized_model_nearer(bits: int) -> None:
    pytest.importorskip("scipy", reason="PEFT asks for scipy before it initialises LoftQ")
    config = kbit.KbitConfig(bits=bits, double_quant=False)
    original = tiny_llama()
    weight = original.model.layers[0].self_attn.q_proj.weight.detach()
    loftq = lora(lora_alpha=4, init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=bits, loftq_iter=3))
    model = kbit.quantize_model(peft.get_peft_model(original, loftq), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with_adapter = (layer.base_layer.dequantize() + layer.get_delta_weight("default") - weight).norm()
    plain = (kbit.quantize(weight, config.weight_format).dequantize() - weight).norm()
    assert with_adapter < 0.95 * plain


def test_loftq_on_a_quantized_base_says_what_to_do() -> None:
    pytest.importorskip("scipy", reason="PEFT asks for scipy before it initialises LoftQ")
    config = lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))
    with pytest.raises(ValueError, match="wrap it with get_peft_model, then call kbit.quantize_model"):
        peft.get_peft_model(quantized("nf4"), config)


def test_adapter_saved_alone_loads_on_a_fresh_base(tmp_path: Path) -> None:
    model = peft.get_peft_model(quantized("nf4"), lora())
    randomize(model)
    model.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 100_000
    fresh = peft.PeftModel.from_pretrained(quantized("nf4"), tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    fresh.merge_adapter()  # an adapter from disk merges like a new one
    assert all(layer.merged for layer in adapter_layers(fresh))


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_embeddings(fmt: str) -> None:
    base = quantized(fmt, quantize_embeddings=True)
    model = peft.get_peft_model(base, lora(target_modules=["embed_tokens", "q_proj"]))
    randomize(model)
    layer = model.base_model.model.model.embed_tokens
    expected = kbit.quantize(
        layer.base_layer.dequantize() + layer.get_delta_weight("default"), layer.base_layer.weight_format
    )
    before = {name: part.clone() for name, part in layer.base_layer.parts().items()}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert layer.lora_embedding_A["default"].grad is not None
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, expected.codes)
    model.unmerge_adapter()
    assert all(torch.equal(part, before[name]) for name, part in layer.base_layer.parts().items())


def test_two_adapters_merge_at_once() -> None:
    model = peft.get_peft_model(quantized("nf4"), lora())
    model.add_adapter("other", lora())
    randomize(model)
    layer = adapter_layers(model)[0]
    total = layer.base_layer.dequantize() + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    model.base_model.set_adapter(["default", "other"])
    layer.merge(adapter_names=["default", "other"])
    assert torch.equal(layer.base_layer.weight, kbit.quantize(total, "nf4").codes)


def test_target_parameters_on_packed_codes_is_refused() -> None:
    config = peft.LoraConfig(r=4, target_parameters=["q_proj.weight"], target_modules=[])
    with pytest.raises(ValueError, match="holds torch.uint8 codes"):
        peft.get_peft_model(quantized("nf4"), config)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_prepare_for_training_and_a_plain_loop(fmt: str, checkpointing: bool) -> None:
    model = kbit.prepare_for_training(quantized(fmt, torch.bfloat16), gradient_checkpointing=checkpointing)
    assert not any(p.requires_grad for p in model.parameters())
    model = peft.get_peft_model(model, lora(target_modules="all-linear")).train()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0], losses


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = kbit.prepare_for_training(quantized("nf4"), gradient_checkpointing=checkpointing)
        model = peft.get_peft_model(model, lora()).train()
        randomize(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("method", ["IA3Config", "VeraConfig", "OFTConfig"])
def test_other_tuners_train_on_quantized_layers(method: str) -> None:
    options = {
        "IA3Config": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "VeraConfig": {"target_modules": ["q_proj", "k_proj"][:1], "r": 4},
        "OFTConfig": {"target_modules": ["q_proj"], "oft_block_size": 8},
    }[method]
    model = peft.get_peft_model(quantized("nf4"), getattr(peft, method)(task_type="CAUSAL_LM", **options))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
@pytest.mark.parametrize("init", [True, "pissa"])
def test_adapters_follow_the_model_dtype_unless_peft_casts_them(fmt: str, init: bool | str) -> None:
    for autocast, expected in ((False, torch.bfloat16), (True, torch.float32)):
        options = {"init_lora_weights": init, "use_dora": init is True}
        model = peft.get_peft_model(quantized(fmt, torch.bfloat16), lora(**options), autocast_adapter_dtype=autocast)
        adapters = {n: p.dtype for n, p in model.named_parameters() if "lora_" in n}
        assert adapters and set(adapters.values()) == {expected}, adapters
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
