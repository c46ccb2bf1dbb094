"""A tiny language model with a tokenizer of its own, on disk, and the command line called in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kbit.cli.app import run

TEXT = "the quick brown fox jumps over the lazy dog while the small cat sleeps near an old stone wall . "


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def kbit(capsys: pytest.CaptureFixture[str], *args: object) -> Result:
    """Run one command line."""
    capsys.readouterr()
    code = run([str(arg) for arg in args])
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def sentence(result: Result) -> str:
    """The one sentence of a refused command: exit code 2, nothing on stdout, one line on stderr."""
    assert result.code == 2, result
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("kbit: "), result.err
    assert "Traceback" not in result.err
    return lines[0].removeprefix("kbit: ")


def make_model(folder: Path, text: str = TEXT) -> Path:
    """A bf16 Llama that has learnt one sentence by heart, so that its perplexity and its words mean something."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *sorted(set(text.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor([fast(text * 3)["input_ids"][:60]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.bfloat16().save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_text(path: Path, repeats: int = 12) -> Path:
    path.write_text(TEXT * repeats, encoding="utf-8")
    return path
