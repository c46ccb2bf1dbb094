"""Measure which tiles are fastest on the GPU at hand: `kbit bench --tune`.

Every Triton operation registers the numbers of tokens its rules are for, its candidates, and how to call it. Candidates
that do not compile there (registers, shared memory) or give another result than the first one drop out; of the rest,
the lowest geometric mean of times over the shapes wins. What comes out has the form of `tuned/default.json`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbit.kernels.triton import tiles
from kbit.kernels.triton.dequantize_4bit import dequantize_4bit
from kbit.kernels.triton.experts_4bit import experts_4bit, experts_4bit_grad_input
from kbit.kernels.triton.linear_4bit import linear_4bit
from kbit.kernels.triton.linear_4bit_grad_input import linear_4bit_grad_input
from kbit.kernels.triton.linear_8bit import linear_8bit
from kbit.kernels.triton.linear_8bit_grad_input import linear_8bit_grad_input
from kbit.kernels.triton.llm_int8 import llm_int8
from kbit.kernels.triton.quantize_4bit import quantize_4bit

Call = partial[Tensor]  # takes the tile as its last argument
# N x K of Llama-3 8B; of experts, for each of 8.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
EXPERTS = 8
# Relative difference between two tiles' results: other orders of summation, rounded to bf16.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Operation:
    """max_m: up to how many tokens each rule serves. candidates: rules for M tokens, without max_m. prepare: data on a
    device for M tokens, N and K, as a call that takes a tile; it is measured over `copies` of the weight."""

    max_m: tuple[int, ...]
    candidates: Callable[[int], list[dict[str, Any]]]
    prepare: Callable[[int, int, int, torch.device, int], Sequence[Call]]


OPERATIONS: dict[str, Operation] = {}


def products(bn: Sequence[int], bk: Sequence[int], **fixed: int) -> Callable[[int], list[dict[str, Any]]]:
    """Candidates of a product: tiles of M tokens, at least 16, with the given sizes, warps and stages."""

    def candidates(m: int) -> list[dict[str, Any]]:
        options = itertools.product(bn, bk, (4, 8), (2, 3, 4))
        return [
            {"bm": max(16, m), "bn": n, "bk": k, **fixed, "warps": warps, "stages": stages}
            for n, k, warps, stages in options
            if n * max(16, m) <= 64 * 256 and (warps == 4 or n * k >= 4096)
        ]

    return candidates


def elements(m: int) -> list[dict[str, Any]]:
    """Candidates of quantizing and dequantizing: elements a program, warps."""
    sizes = itertools.product((1024, 2048, 4096, 8192), (2, 4, 8))
    return [{"bm": 1, "bn": size, "bk": 1, "warps": warps} for size, warps in sizes]


def _packed(n: int, k: int, device: torch.device, copies: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Double-quantized NF4 weights `[N, K]` with random codes: (codes, absmax, nested_absmax, nested_offset)."""
    blocks = n * k // 64
    found = []
    for _ in range(copies):
        codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device=device)
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
        nested = torch.full((-(-blocks // 256),), 0.02, device=device)
        found.append((codes, absmax, nested, torch.full((1,), 0.05, device=device)))
    return found


def _int8(n: int, k: int, device: torch.device, copies: int) -> list[tuple[Tensor, Tensor]]:
    """Random int8 weights: (codes [N, K], scales [N])."""
    codes = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device) for _ in range(copies)]
    return [(c, torch.rand(n, device=device) + 0.1) for c in codes]


def _x(m: int, k: int, device: torch.device) -> Tensor:
    return torch.randn(m, k, device=device).to(torch.bfloat16)


def _offsets(m: int, device: torch.device) -> tuple[int, Tensor]:
    """(rows, where they end) of EXPERTS experts that a rule for `m` tokens an expert serves: half of it each."""
    each = max(1, m // 2)
    return each * EXPERTS, torch.arange(1, EXPERTS + 1, dtype=torch.int32, device=device) * each


def _linear_4bit(m: int, n: int, k: int, device: torch.device, copies: int) -> list[Call]:
    x = _x(m, k, device)
    return [partial(linear_4bit, x, *w, None, "nf4", 64, n) for w in _packed(n, k, device, copies)]


def _linear_4bit_grad(m: int, n: int, k: int, device: torch.device, copies: int) -> list[Call]:
    grad = _x(m, n, device)
    return [partial(linear_4bit_grad_input, grad, *w, "nf4", 64, k) for w in _packed(n, k, device, copies)]


def _linear_8bit(m: int, n: int, k: int, device: torch.device, copies: int) -> list[Call]:
    x = _x(m, k, device)
    return [partial(linear_8bit, x, *w, None) for w in _int8(n, k, device, copies)]


def _linear_8bit_grad(m: int, n: int, k: int, device: torch.device, copies: int) -> list[Call]:
    grad = _x(m, n, device)
    return [partial(linear_8bit_grad_input, grad, *w) for w in _int8(n, k, device, copies)]


def _llm_int8(m: int, n: int, k: int, device: torch.device, copies: int) -> list[Call]:
    x = _x(m, k, device)
    x[:, : k // 64 : 8] = 20.0  # some outlier columns
    return [partial(llm_int8, x, *w, None, 6.0) for w in _int8(n, k, device, copies)]


# The weights of all experts exceed a cache by themselves: one copy serves.
def _experts_4bit(m: int, n: int, k: int, device: torch.device, copies: int) -> list[Call]:
    rows, ends = _offsets(m, device)
    weight = _packed(EXPERTS * n, k, device, 1)[0]
    return [partial(experts_4bit, _x(rows, k, device), ends, *weight, None, "nf4", 64, n)]


def _experts_4bit_grad(m: int, n: int, k: int, device: torch.device, copies: int) -> list[Call]:
    rows, ends = _offsets(m, device)
    weight = _packed(EXPERTS * n, k, device, 1)[0]
    return [partial(experts_4bit_grad_input, _x(rows, n, device), ends, *weight, "nf4", 64, k)]


def _quantize(m: int, n: int, k: int, device: torch.device, copies: int) -> list[Call]:
    return [partial(_codes, _x(n, k, device))]


def _codes(x: Tensor, tile: tiles.Tile) -> Tensor:
    return quantize_4bit(x, "nf4", 64, tile)[0]


def _dequantize(m: int, n: int, k: int, device: torch.device, copies: int) -> list[Call]:
    return [partial(dequantize_4bit, *w, "nf4", 64, (n, k), torch.bfloat16) for w in _packed(n, k, device, copies)]


def _narrow_8bit(m: int) -> list[dict[str, Any]]:
    """One token has a kernel of its own, without matrix units."""
    if m > 1:
        return products((32, 64), (128, 256), split=0)(m)
    sizes = itertools.product((8, 16, 32), (256, 512, 1024), (4, 8))
    return [{"bm": 1, "bn": bn, "bk": bk, "warps": warps, "stages": 2} for bn, bk, warps in sizes]


_few = (16, 32, 64)
_narrow, _deep = products((32, 64, 128), (64, 128), split=0), products((64, 128), (64, 128))
OPERATIONS.update(
    {
        "linear_4bit": Operation(_few, _narrow, _linear_4bit),
        "linear_4bit_grad_input": Operation((16, 64), _deep, _linear_4bit_grad),
        "linear_8bit": Operation((1, *_few), _narrow_8bit, _linear_8bit),
        "linear_8bit_grad_input": Operation((16, 64), _deep, _linear_8bit_grad),
        "llm_int8": Operation((64, 128), products((128, 256), (64, 128)), _llm_int8),
        "experts_4bit": Operation(_few, _narrow, _experts_4bit),
        "experts_4bit_grad_input": Operation((16, 64), _deep, _experts_4bit_grad),
        "quantize_4bit": Operation((1,), elements, _quantize),
        "dequantize_4bit": Operation((1,), elements, _dequantize),
    }
)


def gpu_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call: the best of five turns through all calls."""
    best = math.inf
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in (*calls, *calls, *calls, *calls):
            call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e-3 / (4 * len(calls)))
    return best


@dataclasses.dataclass(frozen=True)
class Measured:
    """The best rule of an operation for up to max_m tokens, its seconds, and those of the rule in use so far."""

    operation: str
    max_m: int
    rule: dict[str, Any]
    seconds: float
    before: float


def _time(
    rule: dict[str, Any], m: int, cases: list[tuple[int, int, Sequence[Call]]], expected: list[Tensor], timer: Any
) -> float:
    """Geometric mean of seconds over the cases; infinite where the rule does not run or gives another result.

    `expected` is filled by the first rule that runs."""
    logs = []
    first = not expected
    found = []
    for i, (n, k, calls) in enumerate(cases):
        tile = tiles.resolve(rule, m, n, k, tiles.processors(calls_device(calls)))
        try:
            out = calls[0](tile)
            if not first and not _same(out, expected[i]):
                return math.inf
            found.append(out)
            logs.append(math.log(timer([partial(call, tile) for call in calls])))
        except Exception as error:  # what Triton and the driver raise here has no common base
            if type(error).__name__ not in ("OutOfResources", "CompilationError", "RuntimeError", "PTXASError"):
                raise
            return math.inf
    if first:
        expected.extend(found)
    return math.exp(sum(logs) / len(logs))


def calls_device(calls: Sequence[Call]) -> torch.device:
    """The device whose tensors a prepared call holds."""
    return next(value.device for value in calls[0].args if isinstance(value, Tensor))


def _same(out: Tensor, expected: Tensor) -> bool:
    if out.dtype == torch.uint8:
        return torch.equal(out, expected)
    difference = (out.float() - expected.float()).norm()
    return bool(difference <= TOLERANCE * expected.float().norm())


def tune(
    device: torch.device,
    operations: Sequence[str],
    timer: Callable[[Sequence[Callable[[], object]]], float] = gpu_seconds,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    copies: int = 8,
) -> Iterator[Measured]:
    """The best rule of every operation, one after the other. ValueError for an operation that does not exist."""
    if unknown := set(operations) - set(OPERATIONS):
        raise ValueError(f"no operation to tune is called {sorted(unknown)[0]!r}; there are {', '.join(OPERATIONS)}")
    for name in operations:
        operation = OPERATIONS[name]
        for m in operation.max_m:
            cases = [(n, k, operation.prepare(m, n, k, device, copies)) for n, k in shapes]
            expected: list[Tensor] = []
            current = tiles.rule_for(name, tiles.gpu_of(device), m)
            before = _time(current, m, cases, expected, timer)
            timed = [(_time(rule, m, cases, expected, timer), rule) for rule in operation.candidates(m)]
            seconds, best = min([(before, current), *timed], key=lambda pair: pair[0])
            yield Measured(name, m, {key: v for key, v in best.items() if key != "max_m"}, seconds, before)


def write(measured: Sequence[Measured], path: Path) -> None:
    """Put rules into a file of tiles; operations that it holds already and that were not measured stay."""
    found = tiles.read(path) if path.is_file() else {}
    for name in dict.fromkeys(m.operation for m in measured):
        found[name] = [{"max_m": m.max_m, **m.rule} for m in measured if m.operation == name]
    lines = [
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(rule)}" for rule in rules) + "\n  ]"
        for name, rules in found.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(file.name, path)
    tiles.forget()
