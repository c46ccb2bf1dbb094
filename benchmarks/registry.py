"""Benchmarks by name: a file registers its function, `run.py` finds and runs it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

# A benchmark takes its command-line arguments and returns what goes into its JSON file: {"rows": [...], ...}.
Run = Callable[[argparse.Namespace], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """name: of the JSON and PNG files. run: measures. plot: draws a result into a file; optional."""

    name: str
    run: Run
    plot: Callable[[dict[str, Any], str], None] | None = None


BENCHMARKS: dict[str, Benchmark] = {}


def register(name: str, plot: Callable[[dict[str, Any], str], None] | None = None) -> Callable[[Run], Run]:
    """Decorator: enter a function as benchmark `name`."""

    def enter(run: Run) -> Run:
        if name in BENCHMARKS:
            raise ValueError(f"two benchmarks are called {name!r}")
        BENCHMARKS[name] = Benchmark(name, run, plot)
        return run

    return enter
