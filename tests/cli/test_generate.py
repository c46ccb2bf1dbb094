"""`kbit generate` on a tiny trained model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.tiny import kbit, make_model, sentence


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("generate") / "model")


def test_text_comes_on_stdout(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model knows one sentence by heart, in four bits too."""
    result = kbit(capsys, "generate", model, "the quick brown", "--max-new-tokens", 6)
    assert result.code == 0, result.err
    assert result.out.split() == "the quick brown fox jumps over the lazy dog".split()


def test_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = kbit(capsys, "generate", model, "the quick", "--format", "int8", "--max-new-tokens", 3, "--json")
    data = result.json
    assert data["text"].split() == ["brown", "fox", "jumps"]
    assert (data["format"], data["tokens"], data["prompt"]) == ("int8", 3, "the quick")
    assert data["tokens_per_second"] > 0


def test_temperature_and_seed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: int) -> str:
        return kbit(
            capsys, "generate", model, "the", "--temperature", 3, "--seed", seed, "--max-new-tokens", 30, "--json"
        ).json["text"]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_the_models_context_is_the_limit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = kbit(capsys, "generate", model, "the quick", "--max-new-tokens", 500, "--json")
    assert result.json["tokens"] <= 62
    assert "reads 64 at most" in sentence(kbit(capsys, "generate", model, "the " * 64))


def test_quantized_checkpoint_needs_no_format(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kbit(capsys, "quantize", model, tmp_path / "q", "--format", "fp4").code == 0
    saved = kbit(capsys, "generate", tmp_path / "q", "the quick", "--max-new-tokens", 4, "--json").json
    live = kbit(capsys, "generate", model, "the quick", "--format", "fp4", "--max-new-tokens", 4, "--json").json
    assert saved["format"] == "fp4" and saved["text"] == live["text"]
    assert "stored as fp4" in sentence(kbit(capsys, "generate", tmp_path / "q", "x", "--format", "nf4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "x", "--format", "nf3"], "unknown format 'nf3'"),
        (["MODEL", "x", "--format", "nf4,fp4"], "one format"),
        (["MODEL", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["MODEL", "x", "--temperature", "-1"], "--temperature"),
        (["MODEL", ""], "prompt is empty"),
        (["./nowhere", "x"], "no folder ./nowhere"),
        (["MODEL"], "Missing argument"),
    ],
)
def test_refusals(model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(model) if a == "MODEL" else a for a in arguments]
    assert message.lower() in sentence(kbit(capsys, "generate", *arguments)).lower()


def test_a_model_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.integrations import tiny_models

    folder = tiny_models.save(tiny_models.t5(), tmp_path / "t5")
    make_model(tmp_path / "donor")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "donor" / name).read_bytes())
    assert "t5 model, not a causal language model" in sentence(kbit(capsys, "generate", folder, "the"))


def test_a_bitsandbytes_checkpoint_without_bitsandbytes(tmp_path: Path) -> None:
    """kbit reads the layout by itself: the drop-in stands in for the library that is not there."""
    import subprocess
    import sys

    folder = tmp_path / "bnb"
    program = f"""
import importlib.metadata as metadata, importlib.util as util, sys
found, version = util.find_spec, metadata.version
class Hide:  # a bitsandbytes that is installed, not the stand-in
    def find_spec(self, name, path=None, target=None):
        from importlib.machinery import PathFinder
        if name == "bitsandbytes":
            return PathFinder.find_spec(name, [p for p in sys.path if "shim" in p])
sys.meta_path.insert(0, Hide())
from kbit.integrations import bitsandbytes as dropin
from kbit.cli.app import run
assert run(["quantize", "demo", {str(folder)!r}, "--format", "nf4", "--layout", "bitsandbytes"]) == 0
import kbit.integrations.bitsandbytes.install as install
install.real_bitsandbytes = lambda: None
sys.exit(run(["generate", {str(folder)!r}, "The file", "--max-new-tokens", "3"]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
