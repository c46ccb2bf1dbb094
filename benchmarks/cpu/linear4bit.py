"""4-bit linear layers on a CPU, milliseconds a call: kbit, torch and bitsandbytes, paired in one run.

    python -m benchmarks.cpu.linear4bit --threads 2 --out benchmarks/results/cpu-linear4bit.json

Double-quantized NF4, blocks of 64. Several copies of every weight take turns, so that each call reads its weight from
memory as in a model, and the libraries take turns, so that noise of the machine meets them alike. A row counts only if
kbit's result agreed with the float64 product of the dequantized weight.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import kbit
from kbit.kernels.cpu import library

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLOURS = {"kbit": "#1f6feb", "torch": "#57606a", "bitsandbytes": "#d1242f"}


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
def measure(n: int, k: int, dtype: torch.dtype, tokens: list[int], seconds: float) -> list[dict[str, Any]]:
    sets = [layers(torch.randn(n, k, dtype=dtype) * 0.02) for _ in range(3)]
    rows = []
    for m in tokens:
        x = torch.randn(m, k, dtype=dtype)
        check(sets[0]["kbit"], x)
        times: dict[str, list[float]] = {name: [] for name in sets[0]}
        begin, turn = time.perf_counter(), 0
        while turn < 4 or (time.perf_counter() - begin < seconds and turn < 60):
            for name in times:
                layer = sets[turn % len(sets)][name]
                start = time.perf_counter()
                layer(x)
                times[name].append((time.perf_counter() - start) * 1e3)
            turn += 1
        values = {name: times[name][1:] for name in times}  # the first call warms up
        median = {name: round(statistics.median(v), 3) for name, v in values.items()}
        fastest = {name: round(min(v), 3) for name, v in values.items()}
        best = min(median["torch"], median["bitsandbytes"])
        rows.append(
            {"n": n, "k": k, "dtype": str(dtype).removeprefix("torch."), "m": m, "ms": median, "fastest_ms": fastest}
        )
        rows[-1] |= {"best_over_kbit": round(best / median["kbit"], 2), "turns": turn}
        rows[-1]["bitsandbytes_over_kbit"] = round(median["bitsandbytes"] / median["kbit"], 2)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def plot(result: dict[str, Any], path: str) -> None:
    import matplotlib.pyplot as plt

    groups = sorted({(row["dtype"], row["n"], row["k"]) for row in result["rows"]})
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 3.6), squeeze=False)
    for axis, (dtype, n, k) in zip(axes[0], groups, strict=True):
        rows = [row for row in result["rows"] if (row["dtype"], row["n"], row["k"]) == (dtype, n, k)]
        for name, colour in COLOURS.items():
            axis.plot([r["m"] for r in rows], [r["ms"][name] for r in rows], "o-", ms=3, label=name, color=colour)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=f"NF4 {n}x{k}, {dtype}")
        axis.set_xticks([r["m"] for r in rows], [str(r["m"]) for r in rows], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=lambda text: [int(m) for m in text.split(",")], default=list(TOKENS))
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=list(DTYPES))
    parser.add_argument("--shape", type=lambda text: [int(v) for v in text.split("x")], default=[4096, 11008])
    parser.add_argument("--seconds", type=float, default=2.0, help="of turns, for each number of tokens")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [row for name in args.dtypes for row in measure(*args.shape, DTYPES[name], args.tokens, args.seconds)]
    result = {
        "benchmark": "NF4 linear layer on a CPU, milliseconds, medians",
        "machine": f"{platform.machine()}, {args.threads} threads: {cpu_name()}, level {library.library().level}",
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "bitsandbytes")},
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, str(args.out.with_suffix(".png")))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor()


if __name__ == "__main__":
    main()
