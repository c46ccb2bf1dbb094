"""`kbit quantize`: what it prints and refuses. What it writes is tested in tests/checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kbit import KbitConfig
from tests.cli.tiny import kbit, make_model, sentence
from tests.integrations import tiny_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("quantize") / "model")


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ([], KbitConfig()),
        (["--format", "int8"], KbitConfig(bits=8)),
        (
            ["--format", "fp4-plain", "--block-size", "128"],
            KbitConfig(format="fp4", double_quant=False, block_size=128),
        ),
        (["--skip", "mlp", "--skip", "*.k_proj"], KbitConfig(skip_modules=["mlp", "*.k_proj"])),
        (["--skip-nothing", "--embeddings"], KbitConfig(skip_modules=[], quantize_embeddings=True)),
        (["--max-shard-size", "20kB"], KbitConfig()),
    ],
)
def test_result_loads(model: Path, tmp_path: Path, options: list[str], config: KbitConfig, capsys) -> None:
    out = tmp_path / "out"
    result = kbit(capsys, "quantize", model, out, *options)
    assert result.code == 0, result.err
    assert str(out) in result.out and config.weight_format.label in result.out
    tiny_models.assert_same_bits(tiny_models.load(out), tiny_models.load(model, config))
    from transformers import AutoTokenizer

    assert (
        AutoTokenizer.from_pretrained(out)("the quick")["input_ids"]
        == AutoTokenizer.from_pretrained(model)("the quick")["input_ids"]
    )


def test_json(model: Path, tmp_path: Path, capsys) -> None:
    data = kbit(capsys, "quantize", model, tmp_path / "out", "--format", "int8", "--json").json
    assert data["quantized"] == 14 and data["format"] == "int8" and data["layout"] == "native"
    assert data["nbytes"] < data["source_bytes"]
    assert data["files"] == ["model.safetensors"]


def test_bitsandbytes_layout(model: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("bitsandbytes")
    assert kbit(capsys, "quantize", model, tmp_path / "out", "--layout", "bitsandbytes").code == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "bitsandbytes" and written["load_in_4bit"]
    theirs, ours = tiny_models.load(tmp_path / "out"), tiny_models.load(model, KbitConfig())
    difference = (tiny_models_logits(theirs) - tiny_models_logits(ours)).abs().max()
    assert difference < 0.25


def tiny_models_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 14).view(2, 6)).logits.float()


def test_existing_out(model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert kbit(capsys, "quantize", model, out).code == 0
    assert "exists already" in sentence(kbit(capsys, "quantize", model, out))
    assert kbit(capsys, "quantize", model, out, "--format", "int8", "--force").code == 0
    assert "quantized already (int8)" in sentence(kbit(capsys, "quantize", out, tmp_path / "again"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_refusals(model: Path, tmp_path: Path, capsys) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((model / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    out = tmp_path / "out"
    for arguments, message in [
        ((model, out, "--format", "bf16"), "unknown format 'bf16'"),
        ((model, out, "--layout", "gguf"), "unknown layout 'gguf'"),
        ((model, out, "--block-size", 48), "block_size must be one of"),
        ((model, out, "--skip", "x", "--skip-nothing"), "contradict"),
        ((model, out, "--max-shard-size", "big"), "not a memory size"),
        ((model, model, "--force"), "the model that is being read"),
        ((tmp_path / "nothing", out), "no folder"),
        ((pickled, out), "pickled weights only"),
        ((model,), "argument"),
    ]:
        assert message in sentence(kbit(capsys, "quantize", *arguments)).replace("'OUT'", "argument"), message
    assert not out.exists()
