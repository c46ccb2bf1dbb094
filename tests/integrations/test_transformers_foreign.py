"""Checkpoints in other layouts load into kbit's own layers: bitsandbytes' layout, and experts saved one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version

import kbit
from kbit.checkpoint import bnb
from kbit.config import KbitConfig
from kbit.formats.spec import Format
from kbit.integrations.transformers import native
from kbit.nn import Linear4bit, Linear8bit
from kbit.nn.base import QuantizedModule, to_parts
from kbit.nn.experts import ExpertWeight
from kbit.ops import dequantize, quantize
from tests.integrations.tiny_models import llama

FUSED = int(transformers_version.split(".")[0]) >= 5
FORMATS = {
    "nf4": Format("nf4", 64, True),
    "fp4-plain": Format("fp4", 64, False),
    "int8": Format("int8", 0, False),
}
IDS = torch.arange(1, 17).view(2, 8)


def quantized_folder(
    model: Any, folder: Path, fmt: Format, *, layout: str = "bitsandbytes", skip: tuple[str, ...] = ("lm_head",)
) -> Path:
    """`model` saved with its linear layers but `skip` quantized one by one, in bitsandbytes' layout or kbit's own."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for key, value in load_file(folder / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if module == key or value.dim() != 2 or "embed" in key or any(name in key for name in skip):
            tensors[key] = value
            continue
        q = quantize(value, fmt)
        if layout == "bitsandbytes":
            tensors.update(bnb.to_tensors(q, module))
        else:
            tensors.update({f"{module}.{part}": tensor for part, tensor in to_parts(q).items()})
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    plain = fmt.is_4bit and not fmt.double_quant
    kbit_config = KbitConfig.from_format(fmt.name + "-plain" * plain)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = (
        bnb.config_dict(kbit_config, None) if layout == "bitsandbytes" else kbit_config.to_dict()
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs)


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_importable", lambda: False)


@pytest.mark.parametrize("name", FORMATS)
def test_a_bitsandbytes_checkpoint_loads_into_native_layers(name: str, tmp_path: Path, no_bitsandbytes: None) -> None:
    fmt = FORMATS[name]
    torch.manual_seed(0)
    folder = quantized_folder(llama(), tmp_path / "theirs", fmt)
    model = load(folder)
    stored = load_file(folder / "model.safetensors")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    assert len(layers) == 14 and all(type(m) is (Linear4bit if fmt.is_4bit else Linear8bit) for m in layers.values())
    for layer_name, layer in layers.items():
        expected = bnb.from_tensors(stored, layer_name, torch.bfloat16)
        assert layer.weight_format == fmt and torch.equal(layer.dequantize(torch.bfloat16), expected.dequantize())
    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["quant_method"] == "kbit"
    assert torch.equal(load(tmp_path / "ours")(IDS).logits, logits)


def test_codes_in_bf16_storage(tmp_path: Path, no_bitsandbytes: None) -> None:
    folder = quantized_folder(llama(intermediate_size=256), tmp_path, FORMATS["nf4"])
    logits = load(folder)(IDS).logits
    tensors = load_file(folder / "model.safetensors")
    tensors = {
        k: t.view(-1).view(torch.bfloat16).view(-1, 1) if k.endswith("proj.weight") else t for k, t in tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(folder)(IDS).logits, logits)


def test_who_loads_a_bitsandbytes_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes or its stand-in where there is one; kbit where there is none, or where KbitConfig asks for it."""
    from transformers.quantizers import auto

    config = bnb.config_dict(KbitConfig(bits=4), None)
    monkeypatch.setattr(native, "_importable", lambda: True)
    assert type(auto.AutoQuantizationConfig.from_dict(config)).__name__ == "BitsAndBytesConfig"
    monkeypatch.setattr(native, "_importable", lambda: False)
    assert isinstance(auto.AutoQuantizationConfig.from_dict(config), KbitConfig)
    monkeypatch.setattr(native, "_importable", lambda: True)
    model = load(quantized_folder(llama(), tmp_path / "4", FORMATS["nf4"]), quantization_config=KbitConfig(bits=4))
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)
    load(tmp_path / "4", quantization_config=KbitConfig())
    for other in ({"bits": 8}, {"format": "fp4"}, {"double_quant": False}, {"block_size": 128}):
        with pytest.raises(ValueError, match=f"the checkpoint is stored .* asks for .*{list(other.values())[0]}"):
            load(tmp_path / "4", quantization_config=KbitConfig(**other))
    asked = KbitConfig(bits=8, int8_activations=False, outlier_threshold=5.0, compute_dtype="float32")
    model = load(quantized_folder(llama(), tmp_path / "8", FORMATS["int8"]), quantization_config=asked)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.int8_activations, layer.outlier_threshold, layer.compute_dtype) == (False, 5.0, torch.float32)


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"
BLOB = f"{Q}.quant_state.bitsandbytes__nf4"
DAMAGE = {
    "truncated metadata": (lambda t: t.update({BLOB: t[BLOB][:-9].clone()}), "is not JSON"),
    "no scales": (lambda t: t.pop(f"{Q}.absmax"), f"lacks {Q}.absmax"),
    "no codes": (lambda t: t.pop(Q), "is missing"),
    "fewer codes": (lambda t: t.update({Q: t[Q][:-4].clone()}), "the checkpoint is damaged"),
    "one layer not quantized": (lambda t: [t.pop(k) for k in list(t) if k.startswith(Q)], "lacks .*q_proj"),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_a_damaged_checkpoint_is_an_error_that_names_the_key(case: str, tmp_path: Path, no_bitsandbytes: None) -> None:
    change, message = DAMAGE[case]
    folder = quantized_folder(llama(), tmp_path, FORMATS["nf4"])
    edit(folder, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(folder)


def test_a_config_whose_weights_are_not_quantized(tmp_path: Path, no_bitsandbytes: None) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = bnb.config_dict(KbitConfig(bits=8), None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="none of its weights is"):
        load(tmp_path)


def moe(**overrides: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    settings: dict[str, Any] = dict(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(MixtralConfig(**{**settings, **overrides}))


@pytest.mark.skipif(not FUSED, reason="transformers 4 keeps experts single: they are linear layers like any other")
@pytest.mark.parametrize("layout", ["bitsandbytes", "native"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("no_bitsandbytes")
def test_single_experts_fuse_with_their_own_codes(layout: str, name: str, tmp_path: Path) -> None:
    """save_pretrained of version 5 writes experts one by one in floating point; quantized, so does version 4."""
    fmt = FORMATS[name]
    torch.manual_seed(0)
    skip = ("lm_head",) if layout == "bitsandbytes" else ("lm_head", "gate.")  # kbit never quantized a router
    folder = quantized_folder(moe(), tmp_path / "single", fmt, layout=layout, skip=skip)
    loaded = load(folder)
    experts = loaded.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, ExpertWeight) and isinstance(experts.down_proj, ExpertWeight)
    assert loaded.config.quantization_config.double_quant == (fmt.name == "int8")
    stored = load_file(folder / "model.safetensors")
    up, down = experts.gate_up_proj.dequantize(torch.float32), experts.down_proj.dequantize(torch.float32)
    for expert in range(3):
        single = f"model.layers.0.block_sparse_moe.experts.{expert}"
        w = {part: _decoded(stored, f"{single}.{part}", fmt, layout) for part in ("w1", "w2", "w3")}
        assert torch.equal(up[expert], torch.cat([w["w1"], w["w3"]])) and torch.equal(down[expert], w["w2"])
    if layout == "bitsandbytes":  # its router was quantized too, and is a floating point weight here
        router = bnb.from_tensors(stored, "model.layers.0.block_sparse_moe.gate", torch.bfloat16).dequantize()
        assert torch.equal(loaded.model.layers[0].mlp.gate.weight, router)
    logits = loaded(IDS).logits
    loaded.save_pretrained(tmp_path / "fused")
    assert torch.equal(load(tmp_path / "fused")(IDS).logits, logits)


def _decoded(stored: dict[str, torch.Tensor], module: str, fmt: Format, layout: str) -> torch.Tensor:
    if layout == "bitsandbytes":
        return dequantize(bnb.from_tensors(stored, module, torch.float32), torch.float32)
    n, k = (128, 192) if module.endswith("w2") else (192, 128)
    cls: Any = Linear4bit if fmt.is_4bit else Linear8bit
    layer = cls(k, n, False, **({"format": fmt} if fmt.is_4bit else {}))
    layer.set_parts({part: stored[f"{module}.{part}"] for part in layer.parts()})
    return layer.dequantize(torch.float32)


def test_quantize_model_and_the_checkpoint_agree(tmp_path: Path, no_bitsandbytes: None) -> None:
    """What was quantized in memory, and the same model through a bitsandbytes checkpoint, compute the same."""
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    folder = quantized_folder(model, tmp_path / "nf4", FORMATS["nf4"])
    in_memory = kbit.quantize_model(load(tmp_path / "bf16"), KbitConfig(bits=4))
    assert torch.equal(load(folder)(IDS).logits, in_memory(IDS).logits)
