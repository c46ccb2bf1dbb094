"""4-bit linear layers on a CPU, milliseconds a call: kbit, torch and bitsandbytes, paired in one run.

    python -m benchmarks.cpu.linear4bit --threads 2 --out benchmarks/results/cpu-linear4bit.json

Double-quantized NF4, blocks of 64. Several copies of every weight take turns, so that each call reads its weight from
memory as in a model, and the libraries take turns, so that noise of the machine meets them alike. A row counts only if
kbit's result agreed with the float64 product of the dequantized weight.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import kbit
from benchmarks.cpu import paired

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def layers(weight: torch.Tensor) -> dict[str, torch.nn.Module]:
    """The same weight in a layer of each library, as a user would have it in a model."""
    import bitsandbytes as bnb

    n, k = weight.shape
    plain = torch.nn.Linear(k, n, bias=False, dtype=weight.dtype)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    other = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=True)
    other.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return {
        "kbit": kbit.nn.Linear4bit.from_linear(plain, "nf4"),
        "torch": plain,
        "bitsandbytes": other.to("cpu").eval(),
    }


def check(layer: Any, x: torch.Tensor) -> None:
    w = layer.dequantize().double()
    exact, magnitude = x.double() @ w.t(), x.double().abs() @ w.t().abs()
    unit = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-24
    if not ((layer(x).double() - exact).abs() <= exact.abs() * unit * 1.01 + magnitude * 2.0**-22).all():
        raise SystemExit(f"wrong result at {tuple(x.shape)} {x.dtype}")


@torch.inference_mode()
def measure(n: int, k: int, name: str, tokens: list[int], seconds: float) -> list[dict[str, Any]]:
    dtype = DTYPES[name]
    sets = [layers(torch.randn(n, k, dtype=dtype) * 0.02) for _ in range(3)]
    rows = []
    for m in tokens:
        x = torch.randn(m, k, dtype=dtype)
        check(sets[0]["kbit"], x)
        calls = {who: [lambda layer=one[who], x=x: layer(x) for one in sets] for who in sets[0]}
        found = paired.turns(calls, seconds)
        rows.append({"n": n, "k": k, "dtype": name, "m": m, **found})
        for who in ("torch", "bitsandbytes"):
            rows[-1][f"{who}_over_kbit"] = round(found[who]["ms"] / found["kbit"]["ms"], 2)
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    paired.layer_benchmark(__doc__, measure, "NF4", TOKENS, DTYPES, seconds=2.0)
