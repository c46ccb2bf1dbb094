"""Tiny random models of several architectures, saved the way users' models are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def _llama(**kwargs: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 512}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **kwargs}))


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            sliding_window=32,
        )
    )


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    # 96 is no multiple of the block size: flat layout, and Conv1D stores the transpose.
    sizes = {"n_embd": 96, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    # word_embed_proj_dim differs from hidden_size: two more linear layers outside the blocks.
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=128,
            word_embed_proj_dim=64,
            ffn_dim=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=512,
            max_position_embeddings=128,
            dropout=0.0,
        )
    )


def _bert(head: bool) -> Any:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    return BertForMaskedLM(config) if head else BertModel(config)


def _t5(tied: bool) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 96, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 512}
    return T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=tied, decoder_start_token_id=0))


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=512,
        )
    )


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            num_local_experts=4,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "mistral": _mistral,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert-masked-lm": lambda: _bert(True),
    "bert": lambda: _bert(False),
    "t5": lambda: _t5(True),
    "t5-untied": lambda: _t5(False),
    "mixtral": _mixtral,
}


@pytest.fixture
def build() -> Callable[[str], Any]:
    """A model by name, random weights, fp32."""

    def make(name: str) -> Any:
        torch.manual_seed(0)
        return MODELS[name]()

    return make


@pytest.fixture
def save(build: Callable[[str], Any], tmp_path: Path) -> Callable[[str], tuple[type, str]]:
    """A saved model by name: its class and its folder."""

    def write(name: str) -> tuple[type, str]:
        model = build(name)
        folder = tmp_path / name
        model.save_pretrained(folder)
        return type(model), str(folder)

    return write
