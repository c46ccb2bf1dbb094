"""`kbit eval` end to end on a tiny trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.tiny import TEXT, kbit, make_model, make_text, sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `text.txt` and `quantized` (nf4)."""
    folder = tmp_path_factory.mktemp("eval")
    make_model(folder / "model")
    make_text(folder / "text.txt")
    from kbit import KbitConfig
    from kbit.checkpoint import quantize_checkpoint

    quantize_checkpoint(folder / "model", folder / "quantized", KbitConfig())
    return folder


def test_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = kbit(capsys, "eval", folder / "model", "--text", folder / "text.txt")
    assert result.code == 0, result.err
    for name in ("bf16", "int8", "nf4", "fp4"):
        assert sum(line.split()[:1] == [name] for line in result.out.splitlines()) == 1
    assert "context 64, stride 32" in result.out


def test_json_numbers_are_right(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the library called by hand."""
    import torch

    from kbit import KbitConfig
    from kbit.eval import encode, perplexity
    from tests.integrations import tiny_models

    result = kbit(
        capsys, "eval", folder / "model", "--formats", "nf4,bf16,nf4-plain,int8", "--text", folder / "text.txt",
        "--stride", 10, "--context", 40, "--max-tokens", 150, "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = {row["format"]: row for row in result.json["rows"]}
    assert list(rows) == ["nf4", "bf16", "nf4-plain", "int8"]
    from transformers import AutoTokenizer

    ids = encode(AutoTokenizer.from_pretrained(folder / "model"), TEXT * 12)
    for name, row in rows.items():
        config = None if name == "bf16" else KbitConfig.from_format(name)
        model = tiny_models.load(folder / "model", config, dtype=torch.bfloat16)
        expected = perplexity(model, ids, context=40, stride=10, max_tokens=150)
        assert row["perplexity"] == pytest.approx(expected.value, rel=1e-6)
        assert (row["tokens"], row["context"], row["stride"]) == (150, 40, 10)
        assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / rows["bf16"]["perplexity"])
    assert rows["bf16"]["ratio"] == rows["bf16"]["quantized_ratio"] == 1.0
    # 2 layers of 4 x 64 x 64 + 3 x 64 x 128 elements, 64 a block.
    elements = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert rows["bf16"]["quantized_bytes"] == 2 * elements
    assert rows["nf4-plain"]["quantized_bytes"] == elements // 2 + elements // 64 * 4
    assert rows["int8"]["quantized_bytes"] == elements + 4 * 2 * (4 * 64 + 2 * 128 + 64)
    assert len(rows["nf4"]["layer_errors"]) == 14 and rows["bf16"]["layer_errors"] == []
    assert 0.005 < rows["nf4"]["mean_error"] < 0.015
    assert rows["int8"]["mean_error"] < 3e-4


def test_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out" / "page.html"
    arguments = ("eval", folder / "model", "--formats", "bf16,nf4", "--text", folder / "text.txt", "--report", page)
    result = kbit(capsys, *arguments, "--prompt", "the quick")
    assert result.code == 0, result.err
    html = page.read_text(encoding="utf-8")
    assert "Error by layer" in html and "Continuing “the quick”" in html and "kbit eval" in html
    page.write_text("somebody's notes")
    assert "not a kbit report" in sentence(kbit(capsys, *arguments))
    assert page.read_text() == "somebody's notes"


def test_model_that_is_quantized_already(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = kbit(capsys, "eval", folder / "quantized", "--text", folder / "text.txt", "--json").json["rows"]
    (live,) = kbit(capsys, "eval", folder / "model", "--formats", "nf4", "--text", folder / "text.txt", "--json").json[
        "rows"
    ]
    assert [row["format"] for row in saved] == ["nf4"]
    for key in ("perplexity", "bytes", "quantized_bytes", "ratio"):
        assert saved[0][key] == live[key], key
    refused = kbit(capsys, "eval", folder / "quantized", "--formats", "bf16,int8", "--text", folder / "text.txt")
    assert "stored as nf4 and cannot be loaded as bf16" in sentence(refused)


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "word.txt").write_text("the")
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe")
    model, text = folder / "model", folder / "text.txt"
    for arguments, message in [
        ((tmp_path / "nothing", "--text", text), "no folder"),
        ((text, "--text", text), "is a file"),
        ((tmp_path, "--text", text), "not a model folder"),
        ((model, "--text", tmp_path / "nothing.txt"), "there is no file"),
        ((model, "--text", tmp_path), "is a folder"),
        ((model, "--text", tmp_path / "binary.txt"), "not UTF-8"),
        ((model, "--text", tmp_path / "empty.txt"), "at least 2"),
        ((model, "--text", tmp_path / "word.txt"), "at least 2"),
        ((model, "--text", text, "--formats", "nf5"), "unknown format 'nf5'"),
        ((model, "--text", text, "--formats", ""), "no format given"),
        ((model, "--text", text, "--formats", "nf4", "--context", 65), "reads 64 at most"),
        ((model, "--text", text, "--formats", "nf4", "--context", 8, "--stride", 9), "stride must be"),
        ((model, "--text", text, "--formats", "nf4", "--max-tokens", 0), "max_tokens"),
        ((model, "--text", text, "--formats", "nf4", "--device", "quantum"), "unknown device 'quantum'"),
        ((model,), "--text"),
    ]:
        assert message in sentence(kbit(capsys, "eval", *arguments)), message


def test_damaged_checkpoints(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "truncated" in sentence(kbit(capsys, "eval", broken, "--formats", "nf4", "--text", folder / "text.txt"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    assert "no tokenizer" in sentence(kbit(capsys, "eval", broken, "--text", folder / "text.txt"))
    raw = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "kbit", "bits": 3}}))
    assert "bits must be 4 or 8" in sentence(kbit(capsys, "eval", broken, "--text", folder / "text.txt"))
