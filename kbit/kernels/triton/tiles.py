"""Tile shapes of the Triton products: read from `tuned/<gpu>.json`, or from `tuned/default.json` for GPUs never seen.

A file maps an operation to rules in order of tokens: `{"linear_4bit": [{"max_m": 16, "bm": 16, ...}, ...]}`. The first
rule whose `max_m` is at least M serves; the last one serves everything above. `split` 0 splits K so that one wave of
programs covers the device. No autotuning happens at run time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tokens, out features and in features a program handles at once; parts of K; warps; pipeline stages.

    left: the weight is the left operand of the product (`linear_8bit` alone asks)."""

    bm: int
    bn: int
    bk: int
    split: int = 1
    warps: int = 4
    stages: int = 2
    left: bool = False


def file_name(gpu: str) -> str:
    """The file that holds the tiles of a GPU, from the name its driver reports."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def rules(gpu: str) -> dict[str, list[dict[str, Any]]]:
    """Rules of every operation for a GPU name; the default ones stand in for what its own file does not hold."""
    found: dict[str, list[dict[str, Any]]] = json.loads((FOLDER / "default.json").read_text())
    own = FOLDER / file_name(gpu)
    if own.is_file():
        found.update(json.loads(own.read_text()))
    return found


def resolve(rule: dict[str, Any], m: int, n: int, k: int, processors: int) -> Tile:
    """The tile of one rule for a product; `split` 0 becomes the number of parts of K that fills the processors."""
    fields = {key: value for key, value in rule.items() if key != "max_m"}
    tile = Tile(**fields)
    if tile.split == 0:
        programs = -(-n // tile.bn) * -(-m // tile.bm)
        # Not below 4 steps a part, or the parts cost more than they bring.
        split = max(1, min(2 * processors // programs, k // (4 * tile.bk)))
        tile = dataclasses.replace(tile, split=split)
    return tile


@functools.cache
def _device(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


@functools.lru_cache(maxsize=4096)
def _choose(operation: str, gpu: str, processors: int, m: int, n: int, k: int, wide: bool) -> Tile:
    candidates = rules(gpu)[operation]
    rule = next((r for r in candidates if m <= r["max_m"]), candidates[-1])
    tile = resolve(rule, m, n, k, processors)
    if wide:  # fp32 operands take twice the registers and shared memory
        tile = dataclasses.replace(tile, bm=max(16, tile.bm // 2), bn=max(16, tile.bn // 2), stages=min(tile.stages, 2))
    return tile


def choose(operation: str, x: Tensor, m: int, n: int, k: int) -> Tile:
    """The tile of `operation` for `x` with M tokens, N out features and K in features, on x's device."""
    gpu, processors = _device(x.device.index) if x.device.type == "cuda" else ("", 64)
    return _choose(operation, gpu, processors, m, n, k, x.dtype == torch.float32)
