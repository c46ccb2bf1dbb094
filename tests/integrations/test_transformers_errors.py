"""Damaged and foreign checkpoints: every one is an error that names the tensor, and none loads as garbage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kbit
from tests.integrations import tiny_models as tiny

LAYER = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[4, 8])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(f"kbit{request.param}")
    model = tiny.load(tiny.save(tiny.llama(), folder / "source"), kbit.KbitConfig(bits=request.param))
    model.save_pretrained(folder / "q")
    return folder / "q"


def damaged(checkpoint: Path, tmp_path: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    return tmp_path


@pytest.mark.parametrize(
    "key",
    [
        f"{LAYER}.weight",
        f"{LAYER}.absmax",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_key(checkpoint: Path, tmp_path: Path, key: str) -> None:
    path = damaged(checkpoint, tmp_path, lambda tensors: tensors.__delitem__(key))
    with pytest.raises(ValueError, match=f"lacks .*{key}"):
        tiny.load(path)


@pytest.mark.parametrize("part", ["nested_absmax", "nested_offset"])
def test_missing_nested_scales(part: str, tmp_path: Path) -> None:
    tiny.load(tiny.save(tiny.llama(), tmp_path / "source"), kbit.KbitConfig(bits=4)).save_pretrained(tmp_path / "q")
    path = damaged(tmp_path / "q", tmp_path, lambda tensors: tensors.__delitem__(f"{LAYER}.{part}"))
    with pytest.raises(ValueError, match=f"lacks {LAYER}.{part}"):
        tiny.load(path)


def test_extra_keys(checkpoint: Path, tmp_path: Path) -> None:
    def norm_scale(tensors: Tensors) -> None:
        tensors["model.norm.absmax"] = torch.zeros(2, dtype=torch.int32)

    def layer_scale(tensors: Tensors) -> None:
        tensors[f"{LAYER}.scales"] = torch.zeros(2)

    for change, key in ((norm_scale, "model.norm.absmax"), (layer_scale, f"{LAYER}.scales")):
        folder = tmp_path / key
        folder.mkdir()
        with pytest.raises(ValueError, match=f"holds {key}"):
            tiny.load(damaged(checkpoint, folder, change))


@pytest.mark.parametrize("part", ["weight", "absmax"])
@pytest.mark.parametrize("kind", ["shape", "dtype", "float"])
def test_a_wrong_shape_or_dtype(checkpoint: Path, tmp_path: Path, part: str, kind: str) -> None:
    key = f"{LAYER}.{part}"

    def change(tensors: Tensors) -> None:
        tensor = tensors[key]
        if kind == "shape":
            tensors[key] = tensor[: tensor.shape[0] // 2].contiguous()
        else:
            tensors[key] = tensor.to(torch.int16 if kind == "dtype" else torch.float32)

    with pytest.raises(ValueError, match=key):
        tiny.load(damaged(checkpoint, tmp_path, change))


def test_a_config_of_another_format(checkpoint: Path, tmp_path: Path) -> None:
    path = damaged(checkpoint, tmp_path, lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    bits = config["quantization_config"]["bits"]
    config["quantization_config"] = kbit.KbitConfig(bits=12 - bits).to_dict()
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.0.*weight"):
        tiny.load(path)
    # Codes without the entry that says they are codes.
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError)):
        tiny.load(path)
    with pytest.raises(ValueError, match=r"model\.layers\.0.*weight.*quantization_config"):
        tiny.load(path, kbit.KbitConfig(bits=bits))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_weight_that_is_not_finite(architecture: str, value: float, bits: int, tmp_path: Path) -> None:
    layer = {"llama": "model.layers.1.mlp.up_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[architecture]
    model = tiny.MODELS[architecture]()
    model.get_submodule(layer).weight.data[3, 5] = value
    path = tiny.save(model, tmp_path, torch.bfloat16)
    with pytest.raises(ValueError, match=rf"{layer}\.weight.*not finite"):
        tiny.load(path, kbit.KbitConfig(bits=bits))


def test_a_missing_weight_of_a_float_checkpoint_is_new_and_stays_in_floating_point(tmp_path: Path) -> None:
    """As without kbit: transformers reports the layer and initializes it. It is never quantized noise."""
    path = tiny.save(tiny.t5(), tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    key = "decoder.block.0.layer.1.EncDecAttention.q.weight"
    del tensors[key]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = tiny.load(path, kbit.KbitConfig(bits=4))
    layer = model.get_submodule(key.removesuffix(".weight"))
    assert type(layer) is torch.nn.Linear and torch.isfinite(layer.weight).all() and layer.weight.std() > 0
    model.save_pretrained(tmp_path / "q")
    tiny.assert_same_bits(model, tiny.load(tmp_path / "q"))


def test_a_float_weight_of_the_wrong_shape(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"][:, :64].contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight"):
        tiny.load(path, kbit.KbitConfig(bits=8))


def test_formats_mixed_in_memory_are_not_saved_under_one_config(tmp_path: Path) -> None:
    model = tiny.llama()
    kbit.quantize_model(model, kbit.KbitConfig(bits=8, skip_modules=["mlp", "lm_head"]))
    kbit.quantize_model(model, kbit.KbitConfig(bits=4))
    with pytest.raises(ValueError, match="several formats"):
        model.save_pretrained(tmp_path)
