"""Tiny random transformers models of every architecture that the tests load, and what the tests compare."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbit.nn.base import QuantizedModule

ROOT = Path(__file__).parents[2]
VOCABULARY = 320


def llama(**overrides: Any) -> Any:
    """Untied unless asked; an intermediate size of 200 leaves down_proj in the flat layout (200 % 64 != 0)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


def gpt2(**overrides: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = dict(vocab_size=VOCABULARY, n_embd=96, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**{**settings, **overrides}))


def bert(**overrides: Any) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return BertForMaskedLM(BertConfig(**{**settings, **overrides}))


def opt(**overrides: Any) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return OPTForCausalLM(OPTConfig(**{**settings, **overrides}))


def t5(**overrides: Any) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    settings = dict(
        vocab_size=VOCABULARY,
        d_model=64,
        d_ff=128,
        d_kv=16,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(T5Config(**{**settings, **overrides}))


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "opt": opt, "t5": t5}


def save(model: Any, path: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
    """Write `model` as an ordinary floating point checkpoint."""
    model.eval().to(dtype).save_pretrained(path, **kwargs)
    return path


def load(path: Path, config: Any = None, model_class: Any = None, **kwargs: Any) -> Any:
    """`from_pretrained` with the class that the config names, quantized if `config` is given."""
    import transformers

    if model_class is None:
        read = transformers.AutoConfig.from_pretrained(path)
        model_class = getattr(transformers, read.architectures[0])
    if config is not None:
        kwargs["quantization_config"] = config
    return model_class.from_pretrained(path, **{"dtype": "auto", **kwargs})


def logits(model: Any) -> Tensor:
    ids = torch.arange(5, 17).remainder(VOCABULARY).view(2, 6)
    kwargs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def quantized(model: torch.nn.Module) -> dict[str, QuantizedModule]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}


def assert_same_bits(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Every entry of the two state dicts is equal: key, dtype, shape, and every bit."""
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype, key
        assert tensor.shape == two[key].shape, key
        assert torch.equal(tensor.contiguous().view(torch.uint8), two[key].contiguous().view(torch.uint8)), key


def run_python(code: str, *args: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that can import this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    env.pop("TRANSFORMERS_VERBOSITY", None)  # kbit's commands set it, in this process too when a test calls them
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, timeout=timeout, check=False
    )
