"""int8 linear layers on a CPU, milliseconds a call: kbit, torch in bf16 or fp32, and bitsandbytes, paired in one run.

    python -m benchmarks.cpu.linear8bit --threads 2 --out benchmarks/results/cpu-linear8bit.json

Outlier threshold 6, five outlier features in the activations. A row counts only if kbit's result agreed with the
float64 product of the dequantized weight as well as LLM.int8() can.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F

import kbit
from benchmarks.cpu import paired

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COPIES = 2


def contestants(weight: torch.Tensor) -> dict[str, Any]:
    """The same weight in a layer of each library, as a user would have it in a model."""
    import bitsandbytes as bnb

    n, k = weight.shape
    plain = torch.nn.Linear(k, n, bias=False, dtype=weight.dtype)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    other = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
    other.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return {
        "kbit": kbit.Linear8bit.from_linear(plain, outlier_threshold=6.0),
        "torch": plain,
        "bitsandbytes": other.to("cpu").eval(),
    }


def check(layer: Any, x: torch.Tensor) -> float:
    """Relative error of the layer's result in the Frobenius norm; SystemExit where it is too large."""
    exact = F.linear(x.double(), layer.dequantize().double())
    error = float((layer(x).double() - exact).norm() / exact.norm())
    if not error < 0.02:
        raise SystemExit(f"wrong result at {tuple(x.shape)} {x.dtype}: relative error {error:.3g}")
    return error


@torch.inference_mode()
def measure(n: int, k: int, name: str, tokens: list[int], seconds: float) -> list[dict[str, Any]]:
    dtype = DTYPES[name]
    sets = [contestants(torch.randn(n, k, dtype=dtype) * 0.02) for _ in range(COPIES)]
    rows = []
    for m in tokens:
        x = torch.randn(m, k).to(dtype)
        x[:, torch.arange(5) * (k // 5)] *= 20
        error = check(sets[0]["kbit"], x)
        calls = {who: [lambda layer=one[who], x=x: layer(x) for one in sets] for who in sets[0]}
        found = paired.turns(calls, seconds)
        row = {"n": n, "k": k, "dtype": name, "m": m, **found, "relative_error": float(f"{error:.3g}")}
        for who in ("torch", "bitsandbytes"):
            row[f"{who}_over_kbit"] = round(found[who]["ms"] / found["kbit"]["ms"], 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    paired.layer_benchmark(__doc__, measure, "int8", TOKENS, DTYPES, seconds=3.0)
