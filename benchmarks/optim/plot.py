"""Draw docs/images/optimizer-memory.png from a result of gpu_memory.py.

python -m benchmarks.optim.plot benchmarks/results/optim-memory-h200.json docs/images/optimizer-memory.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(source: str, target: str) -> None:
    result = json.loads(Path(source).read_text())
    rows = [row for row in result["rows"] if row["optimizer"] in ("AdamW32bit", "AdamW8bit", "PagedAdamW8bit")]
    names = [row["optimizer"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    for axis, values, title in (
        (left, [row["state_bytes_on_device"] / 2**30 for row in rows], "optimizer states on the GPU, GiB"),
        (right, [row["step_ms"] for row in rows], "one step, ms"),
    ):
        bars = axis.bar(names, values, color=["#888888", "#2a6f97", "#61a5c2"])
        axis.bar_label(bars, fmt="%.2f")
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"1 G bf16 parameters, {result['machine']}, {result['date']}", fontsize=9)
    figure.tight_layout()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
