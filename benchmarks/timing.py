"""GPU timing: CUDA-graph replays of a chain of calls, medians with spread.

Give as many callables as weight copies, enough bytes to exceed the L2 cache, so that every call reads its weights from
memory as it does inside a model. Graph replays leave out launch overhead, which `eager` keeps.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

import torch

# Bytes a chain reads at least; several times the L2 of any GPU.
STREAM_BYTES = 300e6


@dataclasses.dataclass(frozen=True)
class Time:
    """Microseconds a call: median, and the 10th and 90th percentile of the repetitions."""

    us: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"us": round(self.us, 3), "low": round(self.low, 3), "high": round(self.high, 3)}


def copies_for(nbytes: int) -> int:
    """How many copies of a weight of `nbytes` make a chain that streams from memory."""
    return max(2, math.ceil(STREAM_BYTES / nbytes))


def _times(run: Callable[[], object], calls: int, repetitions: int) -> Time:
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    times.sort()
    edge = len(times) // 10
    return Time(statistics.median(times), times[edge], times[-1 - edge])


def graph(calls: Sequence[Callable[[], object]], repetitions: int = 21) -> Time:
    """Time of one call, from replays of a CUDA graph of all `calls`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    for _ in range(3):
        captured.replay()
    return _times(captured.replay, len(calls), repetitions)


def eager(calls: Sequence[Callable[[], object]], repetitions: int = 21) -> Time:
    """Time of one call as a user makes it, launch overhead included."""

    def run() -> None:
        for call in calls:
            call()

    run()
    torch.cuda.synchronize()
    return _times(run, len(calls), repetitions)
