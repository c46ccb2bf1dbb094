"""Train the shipped model from scratch for 300 steps with 32-bit and with 8-bit AdamW states, paired by seed.

    python -m benchmarks.optim.from_scratch --seeds 4 --out benchmarks/results/optim-from-scratch.json

Architecture, tokenizer and text are those that kbit ships. Two runs of a pair start from the same weights and see the
same batches in fp32; compared are the mean training loss of the last 20 steps and the loss on held-out text at the end.
Two 32-bit runs that differ in rounding alone (torch's AdamW and kbit's) show how far chance alone takes them apart.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kbit.optim
from benchmarks.cpu.paired import cpu_name
from kbit.assets import demo_model, heldout_text

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tokens_of(path: str) -> Tensor:
    from transformers import AutoTokenizer

    text = Path(path).read_text()
    return torch.tensor(AutoTokenizer.from_pretrained(demo_model())(text)["input_ids"])


def build(seed: int, **changes: Any) -> torch.nn.Module:
    """The shipped architecture with fresh weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(demo_model())
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(DEVICE)


def loss_of(model: torch.nn.Module, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def train(
    make: Any,
    seed: int,
    train_ids: Tensor,
    held: Tensor,
    steps: int,
    batch: int,
    context: int,
    lr: float,
    **changes: Any,
) -> dict[str, float]:
    """One run; the learning rate warms up over a tenth of the steps and then falls to a tenth along a cosine."""
    model = build(seed, **changes)
    optimizer = make(list(model.parameters()), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(context + 1)
    losses = []
    warm = max(1, steps // 10)
    for step in range(steps):
        starts = torch.randint(len(train_ids) - context - 1, (batch, 1), generator=generator)
        loss = loss_of(model, train_ids[starts + span].to(DEVICE))
        loss.backward()
        falling = 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * max(0, step - warm) / (steps - warm))).item()
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warm, falling)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with torch.no_grad():
        rows = held[: len(held) // (context + 1) * (context + 1)].view(-1, context + 1)[:64].to(DEVICE)
        held_loss = statistics.fmean(loss_of(model, part).item() for part in rows.split(16))
    return {"train": torch.stack(losses[-20:]).mean().item(), "heldout": held_loss}


def difference(
    makers: dict[str, Any], seeds: int, ids: Tensor, steps: int, batch: int, context: int, lr: float, **changes: Any
) -> tuple[list[dict[str, Any]], dict[str, dict[str, dict[str, float]]]]:
    """Paired runs, and by how many percent each optimizer's final losses differ from the first one's."""
    train_ids, held = ids[: len(ids) * 4 // 5], ids[len(ids) * 4 // 5 :]
    lines = []
    for seed in range(seeds):
        found = {
            name: train(make, seed, train_ids, held, steps, batch, context, lr, **changes)
            for name, make in makers.items()
        }
        lines.append({"seed": seed, **found})
        print(json.dumps(lines[-1]), flush=True)
    first, *others = makers
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name in others:
        summary[name] = {}
        for kind in ("train", "heldout"):
            off = [100 * (line[name][kind] / line[first][kind] - 1) for line in lines]
            spread = statistics.stdev(off) if len(off) > 1 else 0.0
            summary[name][kind] = {"mean": round(statistics.fmean(off), 3), "standard_deviation": round(spread, 3)}
    return lines, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bitsandbytes", action="store_true", help="also bitsandbytes' 8-bit AdamW")
    parser.add_argument("--torch", action="store_true", help="also torch's AdamW")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    makers: dict[str, Any] = {"AdamW32bit": kbit.optim.AdamW32bit, "AdamW8bit": kbit.optim.AdamW8bit}
    if args.torch:
        makers["torch AdamW"] = torch.optim.AdamW
    if args.bitsandbytes:
        import bitsandbytes

        makers["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit
    ids = tokens_of(heldout_text())
    lines, summary = difference(makers, args.seeds, ids, args.steps, args.batch, args.context, args.lr)
    print(json.dumps(summary, indent=1))
    if args.out:
        result = {
            "benchmark": "the shipped model from scratch: final loss with 8-bit and 32-bit states",
            "machine": "one " + torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name(),
            "date": datetime.date.today().isoformat(),
            "versions": {"torch": torch.__version__},
            "settings": {key: getattr(args, key) for key in ("steps", "batch", "context", "lr")},
            "rows": lines,
            "percent_off_AdamW32bit": summary,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
