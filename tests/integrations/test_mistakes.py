"""The mistakes that people make with quantized models, and what each one gives: docs/troubleshooting.md as tests."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kbit

peft = pytest.importorskip("peft", reason="the peft extra is not installed")
transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

ROOT = Path(__file__).parents[2]
IDS = torch.arange(40).view(2, 20) % 61


def tiny(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(path)
    return str(path)


def lora() -> object:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_device_map_without_accelerate_names_accelerate(folder: str) -> None:
    program = f"""
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "accelerate" else find_spec(name, *rest)
sys.modules["accelerate"] = None  # importing it raises ImportError, as if it were not installed
import kbit, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(
        {folder!r}, quantization_config=kbit.KbitConfig(bits=8), device_map="auto")
except (ImportError, ValueError) as error:
    print("REFUSED", " ".join(str(error).split()))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "REFUSED" in result.stdout and "accelerate" in result.stdout.lower(), result.stdout


def test_int8_on_a_cpu_works_with_outliers(folder: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=kbit.KbitConfig(bits=8), device_map="cpu"
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        error = (model(IDS).logits.float() - reference(IDS).logits).norm() / reference(IDS).logits.norm()
    assert error < 0.03
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 24)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_without_prepare_trains_and_stays_finite(folder: str, bits: int) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=kbit.KbitConfig(bits=bits))
    model = peft.get_peft_model(model, lora()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_pefts_own_preparation_works_too(folder: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=kbit.KbitConfig(bits=4))
    codes = {name: p.clone() for name, p in model.named_parameters() if not p.is_floating_point()}
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), lora()).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    names = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in model.named_parameters()
    }
    assert len(codes) > 0 and all(torch.equal(names[name], part) for name, part in codes.items())


def test_training_the_quantized_base_itself_is_refused_by_the_trainer(folder: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=kbit.KbitConfig(bits=4))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=arguments)


def test_fp32_compute_over_a_16_bit_model_warns_once(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    config = kbit.KbitConfig(bits=4, compute_dtype=torch.float32)
    with caplog.at_level(logging.WARNING, logger="kbit"):
        kbit.quantize_model(tiny(), config)
        assert len([r for r in caplog.records if "compute_dtype" in r.message]) == 1
        caplog.clear()
        transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
        assert len([r for r in caplog.records if "compute_dtype" in r.message]) == 1
        caplog.clear()
        kbit.quantize_model(tiny(torch.float32), config)
        kbit.quantize_model(tiny(), kbit.KbitConfig(bits=4))
        assert not [r for r in caplog.records if "compute_dtype" in r.message]


def test_saving_the_wrapped_base_is_refused_and_the_ways_that_work(folder: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=kbit.KbitConfig(bits=4))
    model = peft.get_peft_model(model, lora())
    with pytest.raises(ValueError, match="merge_adapters"):
        model.get_base_model().save_pretrained(tmp_path / "wrapped")
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    merged = kbit.merge_adapters(model)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, merged(IDS).logits)
