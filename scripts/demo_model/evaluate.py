"""Strided perplexity of a model folder, in bf16 and with its linear layers rounded to int8, NF4 and FP4.

    python evaluate.py MODEL --text FILE [--device cuda]

A simulation in plain torch that depends on nothing else of this repository, so that the recipe can be checked by
itself. The tied head stays in bf16.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
_FP4 = [0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25]
FP4 = sorted({*_FP4, *(-v for v in _FP4)})


def blockwise(
    weight: Tensor, table: list[float], double: bool
) -> Tensor:  # [out, in], in a multiple of 64 -> the same, rounded
    blocks = weight.float().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(table, device=weight.device)
    unit = blocks / scale.clamp_min(1e-38)
    rounded = codes[torch.bucketize(unit, (codes[1:] + codes[:-1]) / 2)]
    if double:  # scales less their mean, in 8 bits; linear codes stand in for the dynamic map, whose error is alike
        mean = scale.mean()
        flat = (scale - mean).reshape(-1)
        padded = F.pad(flat, (0, -len(flat) % 256)).reshape(-1, 256)
        top = padded.abs().amax(1, keepdim=True).clamp_min(1e-38)
        scale = ((padded / top * 127).round() / 127 * top).reshape(-1)[: len(flat), None] + mean
    return (rounded * scale).reshape(weight.shape).to(weight.dtype)


def rows_int8(weight: Tensor) -> Tensor:  # [out, in]
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-38)
    return ((weight.float() * 127 / scale).round() * scale / 127).to(weight.dtype)


def activations_int8(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = args[0].float()
    columns = (x.abs() >= 6.0).reshape(-1, x.shape[-1]).any(0)  # outlier columns stay in 16 bits
    inner = x.masked_fill(columns, 0)
    scale = inner.abs().amax(-1, keepdim=True).clamp_min(1e-38)
    return (torch.where(columns, x, (inner * 127 / scale).round() * scale / 127).to(args[0].dtype), *args[1:])


def in_format(model: nn.Module, name: str) -> nn.Module:
    """A copy of the model with its linear layers, the head excepted, rounded to a format."""
    model = copy.deepcopy(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not path.endswith("lm_head"):
            if name == "int8":
                module.weight.data = rows_int8(module.weight.data)
                module.register_forward_pre_hook(activations_int8)
            elif name == "int8-weights":
                module.weight.data = rows_int8(module.weight.data)
            elif name != "bf16":
                module.weight.data = blockwise(module.weight.data, FP4 if "fp4" in name else NF4, "plain" not in name)
    return model


@torch.no_grad()
def perplexity(
    model: nn.Module, ids: Tensor, context: int = 512, stride: int = 256, batch: int = 16
) -> float:  # ids [T]
    """exp of the mean loss of every token but the first, each after at least context - stride tokens if there are."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    starts = list(range(0, max(1, len(ids) - context + stride), stride))
    windows = [ids[s : s + context] for s in starts]
    for i in range(0, len(windows), batch):
        group = windows[i : i + batch]
        longest = max(map(len, group))
        inputs = torch.stack([F.pad(w, (0, longest - len(w))) for w in group]).to(device)
        logits = model(input_ids=inputs).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), inputs[:, 1:], reduction="none")
        for k, w in enumerate(group):
            first = 0 if i + k == 0 else max(0, context - stride - 1)
            total += losses[k, first : len(w) - 1].sum().item()
            count += max(0, len(w) - 1 - first)
    return math.exp(total / count)


def table(
    model: nn.Module,
    ids: Tensor,
    formats: tuple[str, ...] = ("bf16", "int8-weights", "int8", "nf4-plain", "nf4", "fp4-plain", "fp4"),
) -> dict[str, float]:
    return {name: perplexity(in_format(model, name), ids) for name in formats}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--formats", default="bf16,int8-weights,int8,nf4-plain,nf4,fp4-plain,fp4")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device).eval()
    ids = torch.tensor(tokenizer(args.text.read_text())["input_ids"])
    result = table(model, ids, tuple(args.formats.split(",")))
    print(
        json.dumps(
            {k: {"perplexity": round(v, 4), "ratio": round(v / result["bf16"], 4)} for k, v in result.items()}, indent=1
        )
    )


if __name__ == "__main__":
    main()
