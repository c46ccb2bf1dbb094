"""Timing on a CPU: contestants take turns, so that noise of the machine meets them alike; medians and spread."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kbit.kernels.cpu import library


def turns(calls: dict[str, list[Callable[[], Any]]], seconds: float, least: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds of each contestant: median, 10th and 90th percentile. Its several callables (weight copies) rotate,
    so that a call reads its weight from memory, as in a model. The first turn warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, turn = time.perf_counter(), 0
    while turn < least or (time.perf_counter() - begin < seconds and turn < 100):
        for name, copies in calls.items():
            call = copies[turn % len(copies)]
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
        turn += 1
    found = {}
    for name, values in times.items():
        ordered = sorted(values[1:])
        edge = len(ordered) // 10
        low, high = ordered[edge], ordered[-1 - edge]
        found[name] = {"ms": round(statistics.median(ordered), 3), "low": round(low, 3), "high": round(high, 3)}
    return found


def environment(threads: int) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    except OSError:
        cpu = platform.processor()
    level = library.library().level if library.available() else "none"
    return {
        "machine": f"{platform.machine()}, {threads} threads: {cpu}, level {level}",
        "date": datetime.date.today().isoformat(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "bitsandbytes")},
    }
