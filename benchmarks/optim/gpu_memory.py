"""Memory and step time of AdamW, AdamW8bit and PagedAdamW8bit for 1 G bf16 parameters on a GPU.

    python -m benchmarks.optim.gpu_memory --out benchmarks/results/optim-memory-<gpu>.json

Device memory held by states is what remains allocated after five steps beyond parameters and gradients. Then the paged
run is compared with the unpaged one: same parameters to the bit.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
from pathlib import Path

import torch

import kbit.optim
from benchmarks.optim.gpu_step import timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines, sums = [], {}
    for name in ("AdamW32bit", "AdamW8bit", "PagedAdamW32bit", "PagedAdamW8bit"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(8192, 8192, device="cuda").bfloat16()) for _ in range(15)]
        for p in params:
            p.grad = torch.randn_like(p)
        before = torch.cuda.memory_allocated()
        optimizer = getattr(kbit.optim, name)(params, lr=1e-3)
        median, spread = timed(optimizer.step, 8)
        held = torch.cuda.memory_allocated() - before
        torch.cuda.synchronize()
        sums[name] = [p.detach().view(torch.int16).long().sum().item() for p in params]
        count = sum(p.numel() for p in params)
        lines.append({
            "optimizer": name, "parameters": count, "state_bytes_on_device": held, "step_ms": round(median / 1e3, 2),
            "spread_ms": round(spread / 1e3, 2),
        })  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
        del optimizer, params, p
    same = sums["AdamW8bit"] == sums["PagedAdamW8bit"] and sums["AdamW32bit"] == sums["PagedAdamW32bit"]
    print("paged equals unpaged:", same)
    if not same:
        raise SystemExit("paged and unpaged results differ")
    if args.out:
        result = {
            "benchmark": "optimizer states of 1 G bf16 parameters: device memory and step time",
            "machine": "one " + torch.cuda.get_device_name(),
            "date": datetime.date.today().isoformat(),
            "versions": {"torch": torch.__version__},
            "rows": lines,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
