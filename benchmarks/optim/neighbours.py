"""What one large gradient does to the elements of its block: their moves with 8-bit states, against 32-bit ones.

    python -m benchmarks.optim.neighbours --out benchmarks/results/optim-neighbours.json

One element of each block of 256 has gradients `factor` times those of the others, all random. Of the others: the
largest move in a step, in units of the learning rate, and the root mean square of their moves, as a part of the 32-bit
one's.

The second table has outliers now and then: the element's gradient is `factor` times the others' root mean square at
every `every`th step only. Of the others, with AdamW and no decay: the norm of where they are at last and the largest
move, for 8 and 32 bits, for 8 bits with gradients clipped to 1.5 times their usual norm, and for bitsandbytes'
AdamW8bit where it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from pathlib import Path

import torch

import kbit.optim

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None

NAMES = ("AdamW", "AdEMAMix", "RMSprop", "Adagrad")
FACTORS = (1e2, 1e3, 3e3, 1e4, 1e5)
STEPS, LR = 100, 0.01
# Steps from one outlier to the next, and its factor; gradients are otherwise normal with this deviation.
RARE = ((50, 30.0), (100, 100.0), (500, 1000.0))
RARE_STEPS, RARE_LR, DEVIATION = 1500, 1e-3, 1e-3


def moves(name: str, bits: int, factor: float) -> torch.Tensor:
    """fp32 `[steps, blocks, 255]` moves of the neighbours, in units of the learning rate."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = getattr(kbit.optim, name)([p], lr=LR, weight_decay=0.0, optim_bits=bits)
    found = []
    for _ in range(STEPS):
        before = p.detach().clone()
        p.grad = torch.randn(p.shape, generator=generator)
        p.grad[:, 0] *= factor
        optimizer.step()
        found.append((p.detach() - before)[:, 1:] / LR)
    return torch.stack(found)


def travel(kind: type[torch.optim.Optimizer], every: int, factor: float, clip: float = math.inf) -> tuple[float, float]:
    """Of the neighbours of rare outliers: the norm of their way from the start, and the largest move in units of lr.

    clip: the largest norm of a gradient, as a multiple of that without outliers.
    """
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = kind([p], lr=RARE_LR, weight_decay=0.0)
    largest = 0.0
    for step in range(RARE_STEPS):
        before = p.detach().clone()
        p.grad = torch.randn(p.shape, generator=generator) * DEVIATION
        if step % every == 5:
            p.grad[:, 0] = DEVIATION * factor
        torch.nn.utils.clip_grad_norm_([p], clip * DEVIATION * p.numel() ** 0.5)
        optimizer.step()
        largest = max(largest, (p.detach() - before)[:, 1:].abs().max().item() / RARE_LR)
    return round(p.detach()[:, 1:].norm().item(), 2), round(largest, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in NAMES:
        for factor in FACTORS:
            few, many = moves(name, 8, factor), moves(name, 32, factor)
            row = {
                "algorithm": name,
                "factor": factor,
                "largest_move_8bit": round(few.abs().max().item(), 2),
                "largest_move_32bit": round(many.abs().max().item(), 2),
                "rms_8bit_over_32bit": round((few.square().mean() / many.square().mean()).sqrt().item(), 3),
            }
            rows.append(row)
            print(json.dumps(row))
    kinds = {"8bit": kbit.optim.AdamW8bit, "32bit": kbit.optim.AdamW32bit}
    if bitsandbytes is not None:
        kinds["bitsandbytes_8bit"] = bitsandbytes.optim.AdamW8bit
    rare = []
    for every, factor in RARE:
        found = {"algorithm": "AdamW", "every": every, "factor": factor}
        for name, kind in kinds.items():
            found[f"way_{name}"], found[f"largest_move_{name}"] = travel(kind, every, factor)
        way, largest = travel(kbit.optim.AdamW8bit, every, factor, clip=1.5)
        found |= {"way_8bit_clipped": way, "largest_move_8bit_clipped": largest}
        rare.append(found)
        print(json.dumps(found))
    if args.out:
        result = {
            "benchmark": "moves of elements that share a block of 256 with one of larger gradients",
            "date": datetime.date.today().isoformat(),
            "versions": {
                "torch": torch.__version__,
                "bitsandbytes": bitsandbytes.__version__ if bitsandbytes is not None else None,
            },
            "rows": rows,
            "rare": rare,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
