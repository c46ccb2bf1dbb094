"""One optimizer step on a GPU, in microseconds: kbit, bitsandbytes and torch's fused AdamW, paired in one run.

    python -m benchmarks.optim.gpu_step --out benchmarks/results/optim-<gpu>.json

Four sets of tensors. Each optimizer takes real steps with random gradients, four at a time as fast as the host can call
them; the figure is the median of a quarter of their time, by device events. So a step costs what it takes where the GPU
has work queued, as in training, and the host's time where that is longer. Before timing, three 8-bit steps must equal
the plain torch rules on a small tensor, else the run stops.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kbit.optim

FLOOR_TBS = 4.3  # copy bandwidth measured on an H200
RUN = 4  # steps a sample


def big(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(16384, 14336, device="cuda", dtype=dtype) * 0.02)]


def model_1b() -> list[torch.nn.Parameter]:
    """219 tensors, 1.36 G parameters: hidden 2048, intermediate 5632, 24 layers, vocabulary 32000."""
    layer = [(2048, 2048)] * 4 + [(5632, 2048)] * 2 + [(2048, 5632)] + [(2048,)] * 2
    shapes = layer * 24 + [(32000, 2048)] * 2 + [(2048,)]
    return [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02) for s in shapes]


def lora() -> list[torch.nn.Parameter]:
    """448 tensors, 29 M parameters: rank 11 on all seven projections of 32 layers of Llama-3-8B's shape."""
    shapes: list[tuple[int, int]] = []
    for n, k in ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)):
        shapes += [(11, k), (n, 11)]
    return [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02) for s in shapes * 32]


ROWS: dict[str, tuple[Callable[[], list[torch.nn.Parameter]], int, int]] = {
    # name: tensors, bytes a parameter that an 8-bit step must move, steps to time
    "one fp32 tensor, 235 M": (lambda: big(torch.float32), 16, 20),
    "one bf16 tensor, 235 M": (lambda: big(torch.bfloat16), 10, 20),
    "219 tensors, 1.36 G, bf16": (model_1b, 10, 10),
    "448 LoRA tensors, 29 M, bf16": (lora, 10, 20),
}


def timed(step: Callable[[], Any], count: int) -> tuple[float, float]:
    """Median and spread (75th minus 25th percentile) of microseconds a step."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(RUN):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / RUN)
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), quarters[2] - quarters[0]


def verify() -> None:
    """Three 8-bit steps on the GPU equal the plain rules: scales to the bit, codes but for values between two codes."""
    results = []
    for backend in ("auto", "torch"):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(300, 700, device="cuda"))
        optimizer = kbit.optim.AdamW8bit([p], lr=0.01)
        optimizer.backend = backend
        for _ in range(3):
            p.grad = torch.randn_like(p)
            optimizer.step()
        results.append({"p": p.detach(), **optimizer.state[p]})
    for name, value in results[0].items():
        differ = value != results[1][name]
        if name == "p":
            differ = ~torch.isclose(value, results[1][name], rtol=1e-6, atol=1e-7)
        few = value.numel() // 20_000 if value.dtype == torch.uint8 or name == "p" else 0
        if differ.sum() > few:
            raise SystemExit(f"{name} does not equal the plain rules' in {int(differ.sum())} places: no figures")


def optimizers(params: list[torch.nn.Parameter], only_kbit: bool) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    found: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "kbit AdamW8bit": lambda: kbit.optim.AdamW8bit(params),
        "kbit AdamW32bit": lambda: kbit.optim.AdamW32bit(params),
    }
    if only_kbit:
        return found
    found["torch fused AdamW"] = lambda: torch.optim.AdamW(params, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        print("bitsandbytes is not installed: its columns are missing", file=sys.stderr)
        return found
    found["bitsandbytes AdamW8bit"] = lambda: bitsandbytes.optim.AdamW8bit(params)
    found["bitsandbytes AdamW32bit"] = lambda: bitsandbytes.optim.AdamW32bit(params)
    return found


def measure(only: str, only_kbit: bool) -> list[dict[str, Any]]:
    lines = []
    for name, (build, bytes_each, steps) in ROWS.items():
        if only not in name:
            continue
        params = build()
        for p in params:
            p.grad = torch.randn_like(p) * 0.01
        count = sum(p.numel() for p in params)
        floor = count * bytes_each / FLOOR_TBS / 1e6
        line: dict[str, Any] = {"row": name, "parameters": count, "floor_8bit_us": round(floor, 1)}
        for label, make in optimizers(params, only_kbit).items():
            optimizer = make()
            slow = label.startswith("bitsandbytes") and len(params) > 1
            median, spread = timed(optimizer.step, 4 if slow else steps)
            line[label] = {"us": round(median, 1), "spread_us": round(spread, 1)}
            del optimizer
            gc.collect()
            torch.cuda.empty_cache()
        lines.append(line)
        print(json.dumps(line), flush=True)
        del params
        gc.collect()
        torch.cuda.empty_cache()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--kbit", action="store_true", help="only kbit's columns")
    args = parser.parse_args()
    verify()
    lines = measure(args.only, args.kbit)
    if args.out:
        import triton

        versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
        if "bitsandbytes" in sys.modules:
            versions["bitsandbytes"] = sys.modules["bitsandbytes"].__version__
        result = {
            "benchmark": "optimizer step, microseconds",
            "machine": "one " + torch.cuda.get_device_name(),
            "date": datetime.date.today().isoformat(),
            "versions": versions,
            "rows": lines,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
