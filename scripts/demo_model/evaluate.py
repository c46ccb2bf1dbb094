"""Strided perplexity of a model folder, in bf16 and in kbit's formats. The library measures, as in `kbit demo`.

    python evaluate.py MODEL --text FILE [--device cuda] [--formats bf16,int8,nf4]

Needs kbit, transformers and torch. The tied head and embedding stay in bf16.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import kbit
from kbit import eval as measuring

CONTEXT, STRIDE = 512, 256
FORMATS = ("bf16", "int8", "nf4", "nf4-plain", "fp4", "fp4-plain")


def perplexity(
    model: nn.Module,
    ids: Tensor,
    context: int = CONTEXT,
    stride: int = STRIDE,
    batch: int = 16,
    max_tokens: int | None = None,
) -> float:  # ids [T]
    """exp of the mean loss of every token but the first."""
    result = measuring.perplexity(model, ids, context=context, stride=stride, batch_size=batch, max_tokens=max_tokens)
    return result.value


def in_format(model: nn.Module, name: str) -> nn.Module:
    """A copy of the model with its linear layers, the head excepted, in a format."""
    model = copy.deepcopy(model)
    return model if name == "bf16" else kbit.quantize_model(model, kbit.KbitConfig.from_format(name))


def table(
    model: nn.Module, ids: Tensor, formats: tuple[str, ...] = FORMATS, max_tokens: int | None = None
) -> dict[str, float]:
    """Perplexity by format."""
    return {name: perplexity(in_format(model, name), ids, max_tokens=max_tokens) for name in formats}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--max-tokens", type=int, help="score the first so many tokens only")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device).eval()
    ids = measuring.encode(tokenizer, args.text.read_text(encoding="utf-8"))
    result = table(model, ids, tuple(args.formats.split(",")), args.max_tokens)
    baseline = result.get("bf16")
    print(
        json.dumps(
            {
                name: {"perplexity": round(value, 4), "ratio": round(value / baseline, 4) if baseline else None}
                for name, value in result.items()
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
