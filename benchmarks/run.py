"""Run benchmarks: `python -m benchmarks.run linear4bit`. Writes benchmarks/results/<name>-<gpu>.json and, where the
benchmark draws one, a plot beside it."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import BENCHMARKS

MODULES = ("benchmarks.linear4bit", "benchmarks.linear8bit", "benchmarks.experts", "benchmarks.cold_start")
RESULTS = Path(__file__).parent / "results"


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    versions = {}
    for package in ("torch", "triton", "bitsandbytes"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            module = importlib.util.find_spec(package) and importlib.import_module(package)
            versions[package] = getattr(module, "__version__", None) if module else None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }


def gpu_name() -> str:
    """The GPU's name as files bear it."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--tokens", type=lambda text: [int(m) for m in text.split(",")], help="for example 1,16,1024")
    parser.add_argument(
        "--shapes", type=lambda text: [_shape(s) for s in text.split(",")], help="for example 4096x14336"
    )
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["nf4", "fp4"])
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "these figures need a CUDA GPU, and torch sees none\n")
    benchmark = BENCHMARKS[args.name]
    torch.manual_seed(0)
    result = {**environment(), **benchmark.run(args)}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}-{gpu_name()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    if benchmark.plot is not None:
        benchmark.plot(result, str(path.with_suffix(".png")))
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
