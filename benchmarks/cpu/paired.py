"""Timing on a CPU: contestants take turns, so that noise of the machine meets them alike; medians, spread and plots."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from kbit.kernels.cpu import library

COLOURS = {"kbit": "#1f6feb", "torch": "#57606a", "bitsandbytes": "#d1242f", "torch int4": "#bf8700"}
LABELS = {"torch": "torch {dtype}", "torch int4": "torch int4"}


def _others() -> float:
    """CPU seconds that other processes, and other guests of the machine, have taken; 0 where nobody counts them."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, stolen = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
    own = os.times()
    return user + nice + system + irq + softirq + stolen - own.user - own.system


def turns(calls: dict[str, list[Callable[[], Any]]], seconds: float, least: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds of each contestant: median, 10th and 90th percentile. Its several callables (weight copies) rotate,
    so that a call reads its weight from memory, as in a model. The first turn warms up and does not count.

    Nor do the turns of a fifth of a second in which others took more than a tenth of a core, where there are enough
    others within five times `seconds`; "disturbed" tells where there were not."""
    quiet: dict[str, list[float]] = {name: [] for name in calls}
    loud: dict[str, list[float]] = {name: [] for name in calls}
    for copies in calls.values():
        copies[0]()
    first = time.perf_counter()
    turn, counted = 1, 0.0
    while True:
        times: dict[str, list[float]] = {name: [] for name in calls}
        others, begin = _others(), time.perf_counter()
        while time.perf_counter() - begin < 0.2:
            for name, copies in calls.items():
                call = copies[turn % len(copies)]
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
            turn += 1
        took = time.perf_counter() - begin
        good = _others() - others <= 0.1 * took
        for name, values in times.items():
            (quiet if good else loud)[name] += values
        counted += took if good else 0.0
        enough = min(len(values) for values in quiet.values()) >= least
        if (counted >= seconds and enough) or time.perf_counter() - first > 5 * seconds + 2:
            break
    found: dict[str, dict[str, float]] = {}
    for name in calls:
        ordered = sorted(quiet[name] if enough else quiet[name] + loud[name])
        edge = len(ordered) // 10
        low, high = ordered[edge], ordered[-1 - edge]
        found[name] = {"ms": round(statistics.median(ordered), 3), "low": round(low, 3), "high": round(high, 3)}
        if not enough:
            found[name]["disturbed"] = True
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor()


def environment(threads: int) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    level = library.library().level if library.available() else "none"
    return {
        "machine": f"{platform.machine()}, {threads} threads: {cpu_name()}, level {level}",
        "date": datetime.date.today().isoformat(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "bitsandbytes")},
    }


def layer_benchmark(
    text: str | None,
    measure: Callable[[int, int, str, list[int], float], list[dict[str, Any]]],
    weight: str,
    tokens: Iterable[int],
    dtypes: Iterable[str],
    seconds: float,
) -> None:
    """The command line of a layer's benchmark. measure: rows of (out features, in features, dtype, tokens, seconds of
    turns for each number of tokens); weight: as in `save`; the rest: defaults."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=lambda value: [int(m) for m in value.split(",")], default=list(tokens))
    parser.add_argument("--dtypes", type=lambda value: value.split(","), default=list(dtypes))
    parser.add_argument("--shape", type=lambda value: [int(v) for v in value.split("x")], default=[4096, 11008])
    parser.add_argument("--seconds", type=float, default=seconds, help="of turns, for each number of tokens")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [row for name in args.dtypes for row in measure(*args.shape, name, args.tokens, args.seconds)]
    title = f"{weight} linear layer on a CPU, milliseconds: median, 10th and 90th percentile"
    if args.out:
        save({"benchmark": title, **environment(args.threads), "rows": rows}, args.out, weight)


def save(result: dict[str, Any], path: Path, weight: str) -> None:
    """The result of a layer benchmark as JSON at `path`, and its plot beside it, a panel for each dtype and shape.

    Rows hold n, k, dtype, m and, by contestant, what `turns` gave. weight: "NF4", the format in kbit and bitsandbytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.write_text(json.dumps(result, indent=1) + "\n")
    panels = sorted({(row["dtype"], row["n"], row["k"]) for row in result["rows"]})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, (dtype, n, k) in zip(axes[0], panels, strict=True):
        rows = [row for row in result["rows"] if (row["dtype"], row["n"], row["k"]) == (dtype, n, k)]
        tokens = [row["m"] for row in rows]
        for who, colour in COLOURS.items():
            if who not in rows[0]:
                continue
            label = LABELS.get(who, f"{who} {weight}").format(dtype=dtype)
            axis.plot(tokens, [row[who]["ms"] for row in rows], "o-", ms=3, label=label, color=colour)
            band = ([row[who][edge] for row in rows] for edge in ("low", "high"))
            axis.fill_between(tokens, *band, alpha=0.2, color=colour)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=f"{weight} {n}x{k}, {dtype}")
        axis.set_xticks(tokens, [str(m) for m in tokens], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
