"""Tile shapes of the Triton kernels: measured by `kbit bench --tune`, or shipped for a GPU, or the default ones.

A GPU's tiles are looked up, operation by operation, in the user's folder (`$KBIT_TUNED`, else `~/.config/kbit/tuned`),
then in `tuned/<gpu>.json` of this package, then in `tuned/default.json`, which serves GPUs never seen. Tiles that a GPU
has too little shared memory for lose pipeline stages, then width.

A file maps an operation to rules in order of tokens: `{"linear_4bit": [{"max_m": 16, "bm": 16, ...}, ...]}`. The first
rule whose `max_m` is at least M serves; the last one serves everything above. `split` 0 splits K so that one wave of
programs covers the device. No autotuning happens at run time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "tuned"
# Operations whose `bn` is the elements of a program, which keeps nothing in shared memory.
ELEMENTWISE = ("quantize_4bit", "dequantize_4bit")


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


def user_folder() -> Path:
    """Where measured tiles are kept: $KBIT_TUNED, else the user's configuration folder."""
    if chosen := os.environ.get("KBIT_TUNED"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kbit" / "tuned"


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rules in a file of tiles. ValueError that names the file and what is wrong in it."""
    sizes = {"max_m", "bm", "bn", "bk", "split", "warps", "stages"}
    try:
        found = json.loads(path.read_text())
        for operation, its_rules in found.items():
            if not its_rules or not isinstance(its_rules, list):
                raise ValueError(f"{operation} has no list of rules")
            for rule in its_rules:
                good = all(type(rule[key]) is int and rule[key] >= (key == "max_m") for key in rule.keys() - {"left"})
                if not good or not {"max_m", "bm", "bn", "bk"} <= rule.keys() <= sizes | {"left"}:
                    raise ValueError(f"{operation} holds {rule!r}, which is no rule for a tile")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no file of tiles ({error}); delete it or tune again") from None
    return found  # type: ignore[no-any-return]


@functools.cache
def rules(gpu: str) -> dict[str, list[dict[str, Any]]]:
    """Rules of every operation for a GPU name; the default ones stand in for what its own files do not hold."""
    found = read(FOLDER / "default.json")
    for own in (FOLDER / file_name(gpu), user_folder() / file_name(gpu)):
        if gpu and own.is_file():
            found.update(read(own))
    return found


def forget() -> None:
    """Read the files again at the next product."""
    rules.cache_clear()
    _choose.cache_clear()


def rule_for(operation: str, gpu: str, m: int) -> dict[str, Any]:
    """The rule that serves `m` tokens on a GPU."""
    candidates = rules(gpu)[operation]
    return next((r for r in candidates if m <= r["max_m"]), candidates[-1])


def fit(tile: Tile, operand_bytes: int, shared: int) -> Tile:
    """The tile with fewer stages, then half the width, until its operands fit `shared` bytes of shared memory."""
    while tile.stages * tile.bk * (tile.bm + tile.bn) * operand_bytes > shared:
        if tile.stages > 1:
            tile = dataclasses.replace(tile, stages=tile.stages - 1)
        elif tile.bn > 16:
            tile = dataclasses.replace(tile, bn=tile.bn // 2)
        else:
            break
    return tile


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
def _device(index: int) -> tuple[str, int, int]:
    """(name, multiprocessors, bytes of shared memory a program may have)"""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 65536
    return properties.name, properties.multi_processor_count, shared


def gpu_of(device: torch.device) -> str:
    """The name of a GPU under which its tiles are kept; empty where torch tells none."""
    return _device(device.index or 0)[0] if device.type == "cuda" else ""


def processors(device: torch.device) -> int:
    return _device(device.index or 0)[1] if device.type == "cuda" else 64


@functools.lru_cache(maxsize=4096)
def _choose(operation: str, gpu: str, units: int, shared: int, m: int, n: int, k: int, wide: bool) -> Tile:
    tile = resolve(rule_for(operation, gpu, m), m, n, k, units)
    if wide:  # fp32 operands take twice the registers and shared memory
        tile = dataclasses.replace(tile, bm=max(16, tile.bm // 2), bn=max(16, tile.bn // 2), stages=min(tile.stages, 2))
    if operation in ELEMENTWISE:
        return tile
    return fit(tile, 4 if wide else 2, shared)


def choose(operation: str, x: Tensor, m: int, n: int, k: int) -> Tile:
    """The tile of `operation` for `x` with M tokens, N out features and K in features, on x's device."""
    gpu, units, shared = _device(x.device.index) if x.device.type == "cuda" else ("", 64, 65536)
    return _choose(operation, gpu, units, shared, m, n, k, x.dtype == torch.float32)
