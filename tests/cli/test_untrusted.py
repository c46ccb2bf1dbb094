"""A model folder is data: its Python code and its pickles are refused in one sentence, and never run."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.cli import bench
from tests.cli.tiny import Result, kbit, make_model, make_text, sentence
from tests.integrations import tiny_models

# Every command that takes MODEL, with what else it needs.
COMMANDS = {
    "plan": ["MODEL", "--memory", "1GB"],
    "generate": ["MODEL", "the"],
    "eval": ["MODEL", "--text", "TEXT", "--formats", "nf4"],
    "quantize": ["MODEL", "OUT"],
    "finetune": ["MODEL", "--data", "TEXT", "--output", "OUT", "--steps", "1", "--context", "16"],
}
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "of-its-own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("untrusted") / "model")


@pytest.fixture(params=COMMANDS)
def call(request: Any, tmp_path: Path, donor: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command on a copy of the tiny model; whoever asks on the terminal is told yes, and noticed."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(donor, folder)
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *args: asked.append(args) or "y")
    text = make_text(tmp_path / "text.txt")

    def run(**config: Any) -> Result:
        if config:
            data = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**data, **config}))
        places = {"MODEL": folder, "TEXT": text, "OUT": tmp_path / "out"}
        result = kbit(capsys, request.param, *(places.get(word, word) for word in COMMANDS[request.param]))
        assert not asked
        assert not (tmp_path / "marker").exists()
        if result.code != 0:
            assert not (tmp_path / "out").exists()
        return result

    run.command, run.folder, run.marker = request.param, folder, tmp_path / "marker"  # type: ignore[attr-defined]
    return run


def test_code_of_a_model_type_of_its_own(call: Any) -> None:
    (call.folder / "code.py").write_text(CODE.format(marker=str(call.marker)))
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    said = sentence(call(model_type="of-its-own", architectures=["Model"], auto_map=auto_map))
    assert "Python code of its own" in said and "never runs" in said and "of-its-own" in said


def test_code_beside_a_model_type_of_transformers_is_ignored(call: Any) -> None:
    (call.folder / "code.py").write_text(CODE.format(marker=str(call.marker)))
    result = call(auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    assert result.code == 0, result.err


def test_code_of_the_tokenizer(call: Any) -> None:
    (call.folder / "code.py").write_text(CODE.format(marker=str(call.marker)))
    data = json.loads((call.folder / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": [None, "code.Tokenizer"]}
    data |= {"tokenizer_class": "Tokenizer", "auto_map": auto_map}
    (call.folder / "tokenizer_config.json").write_text(json.dumps(data))
    result = call()
    if result.code != 0:  # transformers may have a tokenizer of its own for the model
        assert "never runs" in sentence(result)


def test_pickled_weights_alone(call: Any) -> None:
    (call.folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, call.folder / "pytorch_model.bin")
    result = call()
    if call.command == "plan":  # reads config.json alone
        assert result.code == 0
    else:
        said = sentence(result)
        assert "pickled weights only (pytorch_model.bin)" in said and "convert the model to safetensors" in said


@pytest.mark.parametrize("call", ["generate", "eval", "finetune"], indirect=True)
def test_an_encoder_is_no_language_model(call: Any) -> None:
    """transformers opens BERT as a language model without a complaint."""
    for file in call.folder.iterdir():
        if not file.name.startswith("tokenizer"):
            file.unlink()
    tiny_models.save(tiny_models.bert(), call.folder)
    assert "BertLMHeadModel is not causal" in sentence(call())


def test_bench_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA GPU" in sentence(kbit(capsys, "bench", "linear4bit"))
    assert "tuning needs a GPU" in sentence(kbit(capsys, "bench", "--tune"))
    assert "belong to --tune" in sentence(kbit(capsys, "bench", "--output", "x.json"))
    monkeypatch.setattr(bench, "checkout", lambda: tmp_path)
    assert "need a checkout" in sentence(kbit(capsys, "bench", "linear4bit"))


def test_bench_runs_the_script_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "benchmarks/run.py").write_text("import sys; print(__name__, *sys.argv[1:]); sys.exit(3)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "checkout", lambda: tmp_path)
    before = list(sys.argv), list(sys.path)
    result = kbit(capsys, "bench", "linear4bit", "--tokens", "1,2")
    assert result.out == "__main__ linear4bit --tokens 1,2\n" and result.code == 3
    assert (list(sys.argv), list(sys.path)) == before
