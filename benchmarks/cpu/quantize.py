"""Quantizing and decoding 16.7 M values on a CPU, milliseconds: kbit and bitsandbytes, paired in one run.

    python -m benchmarks.cpu.quantize --threads 2 --out benchmarks/results/cpu-quantize.json

kbit's calls are the public ones, `kbit.quantize` with its check for values that are not finite, and
`QuantizedTensor.dequantize`. A row counts only if both made the same codes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kbit
from benchmarks.cpu import paired

Pairs = dict[str, dict[str, list[Callable[[], Any]]]]


def pairs(x: torch.Tensor) -> Pairs:
    """By name: one call for each library."""
    import bitsandbytes.functional as bnb

    found: Pairs = {}
    for name in ("nf4", "fp4"):
        ours = kbit.quantize(x, f"{name}-plain")
        theirs, state = bnb.quantize_4bit(x, quant_type=name)
        if not torch.equal(ours.codes.view(-1), theirs.view(-1)):
            raise SystemExit(f"{name}: the codes differ")
        found[f"quantize {name}"] = {
            "kbit": [lambda name=name: kbit.quantize(x, f"{name}-plain")],
            "bitsandbytes": [lambda name=name: bnb.quantize_4bit(x, quant_type=name)],
        }
        found[f"quantize {name}, double"] = {
            "kbit": [lambda name=name: kbit.quantize(x, name)],
            "bitsandbytes": [lambda name=name: bnb.quantize_4bit(x, quant_type=name, compress_statistics=True)],
        }
        found[f"dequantize {name}"] = {
            "kbit": [lambda ours=ours: ours.dequantize()],
            "bitsandbytes": [lambda theirs=theirs, state=state: bnb.dequantize_4bit(theirs, state)],
        }
    ours, (theirs, state) = kbit.quantize(x, "dynamic8"), bnb.quantize_blockwise(x, blocksize=256)
    found["quantize dynamic8"] = {
        "kbit": [lambda: kbit.quantize(x, "dynamic8")],
        "bitsandbytes": [lambda: bnb.quantize_blockwise(x, blocksize=256)],
    }
    found["dequantize dynamic8"] = {
        "kbit": [lambda: ours.dequantize()],
        "bitsandbytes": [lambda: bnb.dequantize_blockwise(theirs, state)],
    }
    found["quantize int8"] = {
        "kbit": [lambda: kbit.quantize(x, "int8")],
        "bitsandbytes": [lambda: bnb.int8_vectorwise_quant(x.half())],
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="of turns, for each operation")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for name, calls in pairs(torch.randn(4096, 4096)).items():
        found = paired.turns(calls, args.seconds)
        ratio = round(found["bitsandbytes"]["ms"] / found["kbit"]["ms"], 2)
        rows.append({"operation": name, **found, "bitsandbytes_over_kbit": ratio})
        print(json.dumps(rows[-1]), flush=True)
    title = "16.7 M fp32 values on a CPU, milliseconds: median, 10th and 90th percentile"
    result = {"benchmark": title, **paired.environment(args.threads), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
