"""AdamW8bit on 16.7 M fp32 parameters on the CPU: kbit, bitsandbytes and torch's fused AdamW, paired in one run.

    python -m benchmarks.optim.cpu_step --threads 2 --out benchmarks/results/optim-cpu.json

The three take turns, so that noise of the machine meets them alike; the figure is the median of all turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import kbit.optim
from benchmarks.cpu.paired import cpu_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import bitsandbytes

    torch.set_num_threads(args.threads)
    gradient = torch.randn(4096, 4096)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    makers: dict[str, Any] = {
        "kbit AdamW8bit": kbit.optim.AdamW8bit,
        "bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit,
        "torch fused AdamW": lambda params: torch.optim.AdamW(params, fused=True),
    }
    for name, make in makers.items():
        p = torch.nn.Parameter(torch.randn(4096, 4096))
        p.grad = gradient
        optimizers[name] = make([p])
        optimizers[name].step()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(args.turns):
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            times[name].append((time.perf_counter() - begin) * 1e3)
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    lows = {name: round(min(values), 2) for name, values in times.items()}
    ratio = round(medians["bitsandbytes AdamW8bit"] / medians["kbit AdamW8bit"], 2)
    result = {
        "benchmark": "AdamW8bit step on 16.7 M fp32 parameters, CPU, milliseconds",
        "machine": f"{platform.machine()}, {args.threads} threads: {cpu_name()}",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__},
        "median_ms": medians,
        "fastest_ms": lows,
        "bitsandbytes_over_kbit": ratio,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
