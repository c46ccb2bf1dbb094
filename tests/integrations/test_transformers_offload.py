"""device_map: auto, cpu, and part of the model on disk; what comes back from disk is what went there, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kbit
from tests.integrations import tiny_models as tiny

ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
CONFIGS = {"nf4": dict(bits=4), "fp4-plain": dict(bits=4, format="fp4", double_quant=False), "int8": dict(bits=8)}


def device_map(model_name: str) -> dict[str, str]:
    if model_name == "gpt2":
        rest = ("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.ln_f", "lm_head")
        return {**dict.fromkeys(rest, "cpu"), "transformer.h.1": "disk"}
    return {**ON_DISK, "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("where", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")])
@pytest.mark.parametrize("bits", [4, 8])
def test_device_maps_without_offload(where: Any, bits: int, tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "source", torch.bfloat16)
    plain = tiny.load(path, kbit.KbitConfig(bits=bits))
    mapped = tiny.load(path, kbit.KbitConfig(bits=bits), device_map=where)
    tiny.assert_same_bits(plain, mapped)
    assert torch.equal(tiny.logits(plain), tiny.logits(mapped))
    mapped.save_pretrained(tmp_path / "q")
    tiny.assert_same_bits(plain, tiny.load(tmp_path / "q", device_map=where))


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_disk_offload_round_trip(architecture: str, name: str, tmp_path: Path) -> None:
    config = kbit.KbitConfig(**CONFIGS[name])
    path = tiny.save(tiny.MODELS[architecture](), tmp_path / "source", torch.bfloat16)
    plain = tiny.load(path, config)
    expected = tiny.logits(plain)

    # Quantized while loading, part of it straight to disk.
    where = device_map(architecture)
    model = tiny.load(path, config, device_map=where, offload_folder=str(tmp_path / "offload"))
    on_disk = [layer for name_, layer in tiny.quantized(model).items() if ".1." in name_]
    assert on_disk and all(part.is_meta for layer in on_disk for part in layer.parts().values())
    for _ in range(2):
        assert torch.equal(tiny.logits(model), expected)
    assert all(part.is_meta for layer in on_disk for part in layer.parts().values())

    # Saved from there, and loaded with and without offload.
    model.save_pretrained(tmp_path / "q")
    tiny.assert_same_bits(plain, tiny.load(tmp_path / "q"))
    again = tiny.load(tmp_path / "q", device_map=where, offload_folder=str(tmp_path / "offload2"))
    assert torch.equal(tiny.logits(again), expected)
    again.save_pretrained(tmp_path / "q2", max_shard_size="40KB")
    tiny.assert_same_bits(plain, tiny.load(tmp_path / "q2"))
    ids = torch.arange(4)[None]
    assert again.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("bits", [4, 8])
def test_auto_with_little_memory_offloads_by_quantized_size(bits: int, tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(num_hidden_layers=4), tmp_path / "source", torch.bfloat16)
    plain = tiny.load(path, kbit.KbitConfig(bits=bits))
    total = plain.get_memory_footprint()
    layer = sum(p.nbytes for p in plain.model.layers[0].parameters())
    # Room for the embedding, two layers, and the largest layer that accelerate keeps free for what comes back.
    room = total - 2 * layer - plain.lm_head.weight.nbytes + max(layer, plain.lm_head.weight.nbytes) + 1024
    arguments = dict(device_map="auto", max_memory={"cpu": room}, offload_folder=str(tmp_path / "offload"))
    for source, config in ((path, kbit.KbitConfig(bits=bits)), (tmp_path / "q", None)):
        if config is None:
            plain.save_pretrained(source)
        model = tiny.load(source, config, **arguments)
        devices = set(model.hf_device_map.values())
        assert "disk" in devices and "cpu" in devices, model.hf_device_map
        assert torch.equal(tiny.logits(model), tiny.logits(plain))
        assert not any(p.is_meta for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_tied_tables_on_disk(bits: int, tmp_path: Path) -> None:
    config = kbit.KbitConfig(bits=bits, quantize_embeddings=True)
    path = tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path / "source", torch.bfloat16)
    plain = tiny.load(path, config)
    where = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where["lm_head"] = "disk"
    model = tiny.load(path, config, device_map=where, offload_folder=str(tmp_path / "offload"))
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    model.save_pretrained(tmp_path / "q")
    tiny.assert_same_bits(plain, tiny.load(tmp_path / "q"))
    again = tiny.load(tmp_path / "q", device_map=where, offload_folder=str(tmp_path / "offload2"))
    assert torch.equal(tiny.logits(again), tiny.logits(plain))


def test_offload_errors(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "source", torch.bfloat16)
    with pytest.raises(ValueError, match="offload_folder"):
        tiny.load(path, kbit.KbitConfig(bits=4), device_map=device_map("llama"))
    model = tiny.load(path, kbit.KbitConfig(bits=4), device_map=device_map("llama"), offload_folder=str(tmp_path / "o"))
    with pytest.raises(ValueError, match="offloaded"):
        model.dequantize()
    bad = tiny.llama()
    bad.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    tiny.save(bad, tmp_path / "bad")
    where = dict(device_map=device_map("llama"), offload_folder=str(tmp_path / "o"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*not finite"):
        tiny.load(tmp_path / "bad", kbit.KbitConfig(bits=4), **where)
