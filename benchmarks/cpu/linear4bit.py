"""4-bit linear layers on a CPU, milliseconds a call: kbit, torch, bitsandbytes and torch's int4, paired in one run.

    python -m benchmarks.cpu.linear4bit --threads 2 --out benchmarks/results/cpu-linear4bit.json

Double-quantized NF4, blocks of 64. Several copies of every weight take turns, so that each call reads its weight from
memory as in a model, and the libraries take turns, so that noise of the machine meets them alike. A row counts only if
kbit's result agreed with the float64 product of the dequantized weight.

torch's int4 (`torch.ops.aten._weight_int4pack_mm_for_cpu`, what torchao calls) has another format: 16 equal steps from
each group's smallest to its largest weight, in groups of 64. Its kernel is for bf16; for fp32 it has plain loops only.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import kbit
from benchmarks.cpu import paired

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TorchInt4(torch.nn.Module):
    """torch's own 4-bit product for CPUs: groups of 64 weights have 16 equal steps between their extremes."""

    GROUP = 64

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        n, k = weight.shape
        groups = weight.float().view(n, k // self.GROUP, self.GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        step = ((high - low) / 15).to(weight.dtype)
        middle = (low + 8 * step.float()).to(weight.dtype)  # what code 8 stands for
        codes = ((groups - middle.float()[..., None]) / step.float()[..., None] + 8).round().clamp(0, 15)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().view(n, k), 1)
        self.scales = torch.stack((step, middle), -1).transpose(0, 1).contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.GROUP, self.scales)


def layers(weight: torch.Tensor) -> dict[str, torch.nn.Module]:
    """The same weight in a layer of each library, as a user would have it in a model."""
    import bitsandbytes as bnb

    n, k = weight.shape
    plain = torch.nn.Linear(k, n, bias=False, dtype=weight.dtype)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    other = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=True)
    other.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    found = {
        "kbit": kbit.nn.Linear4bit.from_linear(plain, "nf4"),
        "torch": plain,
        "bitsandbytes": other.to("cpu").eval(),
    }
    if weight.dtype == torch.bfloat16 and n % 64 == 0 and k % TorchInt4.GROUP == 0:
        found["torch int4"] = TorchInt4(weight)
    return found


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
        for who in list(found)[1:]:
            rows[-1][f"{who}_over_kbit"] = round(found[who]["ms"] / found["kbit"]["ms"], 2)
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    paired.layer_benchmark(__doc__, measure, "NF4", TOKENS, DTYPES, seconds=2.0)
