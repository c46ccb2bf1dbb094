"""Fused experts of mixture-of-experts models (transformers 5) in 4 and 8 bits."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import kbit

tf = pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("transformers.integrations.moe", reason="transformers 4 keeps experts as separate linear layers")

from kbit.nn.experts import ExpertWeight  # noqa: E402

IDS = torch.arange(24).view(2, 12) * 3 % 97
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def mixtral(**options: object) -> nn.Module:
    config = tf.MixtralConfig(**{**COMMON, "intermediate_size": 128, "num_local_experts": 4, **options})
    return tf.MixtralForCausalLM(config)


def qwen3_moe(**options: object) -> nn.Module:
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**{**COMMON, **sizes, "head_dim": 32, **options}))


def qwen2_moe(**options: object) -> nn.Module:
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    config = tf.Qwen2MoeConfig(**{**COMMON, **sizes, "shared_expert_intermediate_size": 64, **options})
    return tf.Qwen2MoeForCausalLM(config)


def gpt_oss(**options: object) -> nn.Module:
    sizes = {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**{**COMMON, **sizes, **options}))


def llama4(**options: object) -> nn.Module:
    sizes = {"intermediate_size": 64, "intermediate_size_mlp": 128, "num_local_experts": 2, "head_dim": 32}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**{**COMMON, **sizes, **options}))


MODELS = [mixtral, qwen3_moe, gpt_oss, llama4]
FORMATS = ["nf4", "nf4-plain", "fp4", "int8"]


def weights(model: nn.Module) -> list[ExpertWeight]:
    return [m for m in model.modules() if isinstance(m, ExpertWeight)]


def eager(model: nn.Module) -> nn.Module:
    """A floating point copy that runs the model's own experts."""
    copied = kbit.dequantize_model(copy.deepcopy(model), torch.float64).double()
    if not any(type(m).__name__ == "Llama4TextExperts" for m in copied.modules()):  # it has only one
        copied.set_experts_implementation("eager")
    return copied


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_forward_and_gradients_are_those_of_the_dequantized_experts(make, fmt: str) -> None:
    model = kbit.quantize_model(make().double(), kbit.KbitConfig.from_format(fmt))
    oracle = eager(model)
    assert len(weights(model)) == 4 and not weights(oracle)
    ids = IDS[:1, :8]  # few tokens: int8 activations stay unquantized
    inputs = [m.get_input_embeddings()(ids).detach().requires_grad_() for m in (model, oracle)]
    out = [m(inputs_embeds=x).logits for m, x in zip((model, oracle), inputs, strict=True)]
    for logits in out:
        logits.square().sum().backward()
    # The models' norms and rotary embeddings compute in fp32, so float64 agrees to fp32's rounding.
    assert error(out[0], out[1]) < 1e-5 and error(inputs[0].grad, inputs[1].grad) < 1e-5


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_memory_really_falls(make) -> None:
    model = make(hidden_size=256, intermediate_size=512).bfloat16()
    linear = {id(m.weight): m.weight.nbytes for n, m in model.model.layers.named_modules() if type(m) is nn.Linear}
    fused = sum(p.nbytes for p in model.parameters() if p.dim() == 3)
    kbit.quantize_model(model, kbit.KbitConfig(bits=4))
    assert not any(p.dim() == 3 and p.is_floating_point() for p in model.parameters())
    assert kbit.model_memory(model).quantized <= 0.27 * (sum(linear.values()) + fused)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_load_save_and_load_again_to_the_bit(make, fmt: str, tmp_path: Path) -> None:
    config = kbit.KbitConfig.from_format(fmt)
    make().bfloat16().save_pretrained(tmp_path / "float")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    other = kbit.quantize_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "float"), config)
    assert len(weights(model)) == 4
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    with torch.no_grad():
        logits = model(IDS).logits
    for name in ("once", "twice"):
        model.save_pretrained(tmp_path / name)
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, logits)


def test_disk_offload_and_back(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="offloading needs accelerate")
    mixtral().save_pretrained(tmp_path / "float")
    config = kbit.KbitConfig(bits=4)
    kbit_model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    kbit_model.save_pretrained(tmp_path / "nf4")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    offloaded = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "nf4", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, kbit_model(IDS).logits)


def test_blocks_that_cross_experts_and_odd_sizes() -> None:
    """moe_intermediate_size 24: no row and no expert ends where a block does."""
    model = kbit.quantize_model(qwen3_moe(hidden_size=40, moe_intermediate_size=9).double(), kbit.KbitConfig(bits=4))
    with torch.no_grad():
        assert error(model(IDS).logits, eager(model)(IDS).logits) < 1e-5


def test_copies_pickle_and_state_dict() -> None:
    model = kbit.quantize_model(mixtral(), kbit.KbitConfig(bits=4))
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(copy.deepcopy(model)(IDS).logits, logits)
        assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, logits)
        fresh = kbit.quantize_model(mixtral(), kbit.KbitConfig(bits=4))
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(IDS).logits, logits)


def test_dequantize_restores_the_parameters() -> None:
    original = gpt_oss()
    shapes = {name: p.shape for name, p in original.named_parameters()}
    before = original.config._experts_implementation
    model = kbit.dequantize_model(kbit.quantize_model(copy.deepcopy(original), kbit.KbitConfig(bits=8)))
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert model.config._experts_implementation == before
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, original.get_parameter(name), rtol=0, atol=2e-3)


def test_experts_can_be_left_alone() -> None:
    for options in ({"quantize_experts": False}, {"skip_modules": ["experts", "lm_head"]}):
        model = kbit.quantize_model(mixtral(), kbit.KbitConfig(bits=4, **options))
        assert not weights(model)
        assert any(isinstance(m, kbit.Linear4bit) for m in model.modules())
        model(IDS)


def test_a_bad_weight_is_named_before_anything_changes() -> None:
    model = mixtral()
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.down_proj.*NaN at \[2, 3, 4\]"):
        kbit.quantize_model(model, kbit.KbitConfig(bits=4))
    assert not weights(model) and not any(isinstance(m, kbit.Linear4bit) for m in model.modules())


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_loss_falls_with_lora(make) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    torch.manual_seed(0)
    model = kbit.prepare_for_training(kbit.quantize_model(make().bfloat16(), kbit.KbitConfig(bits=4)))
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("modules", [[], ["q_proj"], "all-linear"], ids=str)
def test_target_parameters_on_packed_experts_is_refused(modules) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    model = kbit.quantize_model(mixtral(), kbit.KbitConfig(bits=4))
    for name in ("mlp.experts.gate_up_proj", "experts.down_proj", "mlp.experts.gate_up_proj.weight"):
        with pytest.raises(
            ValueError, match=rf"'{name}', but model\.layers\.0\.mlp\.experts\..*quantize_experts=False"
        ):
            peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules, target_parameters=[name]))
    assert not any("lora" in name for name, _ in model.named_modules()), "nothing was changed before the error"


def test_experts_named_one_by_one_are_refused_where_they_are_packed() -> None:
    """PEFT takes names of transformers 4 for the fused Parameters, which are no longer there."""
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    for make, name in ((mixtral, "w1"), (mixtral, "down_proj"), (qwen3_moe, "gate_proj")):
        model = kbit.quantize_model(make(), kbit.KbitConfig(bits=4))
        with pytest.raises(ValueError, match=f"target_modules names '{name}'.*quantize_experts=False"):
            peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", name]))


@pytest.mark.parametrize(
    "targets",
    [r".*experts\.gate_up_proj", r".*experts\.\d+\.w1", r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w[123]"],
)
def test_a_pattern_that_names_experts_is_refused_where_they_are_packed(targets: str) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    model = kbit.quantize_model(mixtral(), kbit.KbitConfig(bits=4))
    with pytest.raises(ValueError, match=r"target_modules names .*layers\.0\.mlp\.experts.*quantize_experts=False"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_pattern_that_names_experts_among_others(caplog) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    model = kbit.quantize_model(mixtral(), kbit.KbitConfig(bits=4))
    config = peft.LoraConfig(r=4, target_modules=r".*(q_proj|experts\.\d+\.w1)")
    assert adapted(peft.get_peft_model(copy.deepcopy(model), config)) == {"self_attn.q_proj"}
    assert "codes of 4 experts in one piece" in caplog.text
    caplog.clear()
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=r".*self_attn\..*_proj"))
    assert not caplog.text


def test_a_shared_expert_and_packed_ones_of_the_same_name() -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    model = kbit.quantize_model(qwen2_moe(), kbit.KbitConfig(bits=4))
    with pytest.raises(
        ValueError, match=r"target_modules names 'down_proj', but model\.layers\.0\.mlp\.experts\.down_proj"
    ):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], exclude_modules=r".*\.experts\..*")
    assert adapted(peft.get_peft_model(model, config)) == {"self_attn.q_proj", "mlp.shared_expert.down_proj"}


def adapted(model: nn.Module) -> set[str]:
    """Names of what has adapters, as in layer 0."""
    return {
        n.split("layers.0.")[1].partition(".lora_A")[0]
        for n, _ in model.named_parameters()
        if "layers.0" in n and "lora_A" in n
    }


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, qwen2_moe])
def test_all_linear_means_the_linear_layers_that_are_there(make, tmp_path: Path, caplog) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    shared = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")} | {"mlp.shared_expert_gate"}
    linear = attention | (shared if make is qwen2_moe else set())
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    base = kbit.quantize_model(make(), kbit.KbitConfig(bits=4))
    with caplog.at_level("WARNING", logger="kbit"):
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**lora))
    assert adapted(model) == linear
    assert "get no adapters" in caplog.text
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert not torch.equal(model.unload()(IDS).logits, again(IDS).logits)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_experts_left_in_16_bits_are_adapted_as_ever(make) -> None:
    """What users of bitsandbytes have, which never quantizes fused experts: all-linear is experts and router too."""
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    model = kbit.quantize_model(make().bfloat16(), kbit.KbitConfig(bits=4, quantize_experts=False))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert {"mlp.experts", "mlp.experts.base_layer", "mlp.gate", "self_attn.q_proj"} <= adapted(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "experts" in n and "lora_B" in n}
    assert len(grads) == 4 and all(g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_plan_knows_the_bytes(make, fmt: str) -> None:
    from kbit.plan.weights import plan_weights

    model = make().bfloat16()
    planned = plan_weights(model, fmt)
    kbit.quantize_model(model, kbit.KbitConfig.from_format(fmt))
    assert planned.quantized == kbit.model_memory(model).quantized
    assert planned.total == kbit.model_memory(model)


def test_layer_errors_name_the_experts() -> None:
    from kbit.eval.layer_error import layer_errors

    errors = {e.name: e.error for e in layer_errors(gpt_oss(), kbit.KbitConfig(bits=4))}
    # About 8.5e-3 for Gaussian weights in blocks of 64.
    assert 0.006 < errors["model.layers.0.mlp.experts.gate_up_proj"] < 0.011
    assert 0.006 < errors["model.layers.1.mlp.experts.down_proj"] < 0.011


def test_converting_files_says_how_to_quantize_experts(tmp_path: Path) -> None:
    from kbit.checkpoint.native import quantize_checkpoint

    mixtral().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="--skip experts"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "nf4", kbit.KbitConfig(bits=4))
    config = kbit.KbitConfig(bits=4, skip_modules=["experts", "lm_head"])
    quantize_checkpoint(tmp_path / "float", tmp_path / "nf4", config)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    other = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, other(IDS).logits)
