"""Tiny models with a tokenizer, and subprocesses in which kbit is bitsandbytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
SHIM = ROOT / "kbit" / "integrations" / "bitsandbytes" / "shim"
WORDS = "a the one two brave knight story tell me of what is capital world hello how are you short about . , ?".split()


def environment(shim: bool) -> dict[str, str]:
    """One thread, no hub; with `shim`, bitsandbytes is kbit, else whatever is installed."""
    folders = [*([str(SHIM)] if shim else []), str(ROOT)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(folders),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_file(script: Path, *args: object, shim: bool = True, cwd: Path | None = None) -> str:
    """stdout of a script; the test fails with its stderr if it fails."""
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(shim), cwd=cwd, timeout=500, check=False
    )
    assert done.returncode == 0, f"{script.name} {' '.join(map(str, args))}\n{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout


def run_kbit(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`kbit run ...`."""
    env = {**environment(False), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kbit", "run", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=500, check=False)


def llama(**overrides: object):  # type: ignore[no-untyped-def]
    """A random Llama in bf16; the same one for the same overrides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).to(torch.bfloat16)


def save_llama(folder: Path) -> Path:
    """The random Llama with a word tokenizer, as a model folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    llama().save_pretrained(folder)
    names = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return folder
