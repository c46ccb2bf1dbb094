"""What one large gradient does to the elements of its block: their moves with 8-bit states, against 32-bit ones.

    python -m benchmarks.optim.neighbours --out benchmarks/results/optim-neighbours.json

One element of each block of 256 has gradients `factor` times those of the others, all random. Of the others: the
largest move in a step, in units of the learning rate, and the root mean square of their moves, as a part of the 32-bit
one's.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch

import kbit.optim

NAMES = ("AdamW", "AdEMAMix", "RMSprop", "Adagrad")
FACTORS = (1e2, 1e3, 3e3, 1e4, 1e5)
STEPS, LR = 100, 0.01


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
    if args.out:
        result = {
            "benchmark": "moves of elements that share a block of 256 with one of larger gradients",
            "date": datetime.date.today().isoformat(),
            "versions": {"torch": torch.__version__},
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
