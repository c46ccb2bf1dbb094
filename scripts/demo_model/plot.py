"""Draw loss.csv as loss.png."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
with open(HERE / "loss.csv") as f:
    rows = list(csv.DictReader(f))
tokens = [int(r["tokens"]) / 1e6 for r in rows]
fig, ax = plt.subplots(figsize=(7, 4), dpi=130)
ax.plot(tokens[1:], [float(r["train_loss"]) for r in rows[1:]], label="training (with weight noise)", color="#4c72b0")
ax.plot(
    tokens[1:],
    [float(r["heldout_loss"]) for r in rows[1:]],
    label="held out, in windows of 512 (no noise)",
    color="#c44e52",
)
ax.set(xlabel="million tokens", ylabel="loss (nats a token)", ylim=(2.5, 5.0), title="Demo model, 7.87 M parameters")
ax.grid(alpha=0.3)
ax.legend(frameon=False, loc="upper right")
ax.annotate(
    f"{float(rows[-1]['heldout_loss']):.2f}",
    (tokens[-1], float(rows[-1]["heldout_loss"])),
    textcoords="offset points",
    xytext=(-6, 8),
    color="#c44e52",
)
fig.tight_layout()
fig.savefig(HERE / "loss.png")
