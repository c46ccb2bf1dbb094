"""`Format`: how the elements of one tensor are stored. Frozen, comparable, and JSON in and out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FORMAT_NAMES = ("nf4", "fp4", "int8", "dynamic8", "dynamic8-unsigned")
# Names that the command line and `Format.parse` accept beside the plain ones.
_ALIASES = {"nf4-plain": ("nf4", False), "fp4-plain": ("fp4", False)}
NESTED_BLOCK_SIZE = 256


def check_block_size(size: object) -> None:
    """ValueError unless `size` is a block size that exists."""
    if type(size) is not int or size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {size!r}")


@dataclasses.dataclass(frozen=True)
class Format:
    """The storage of one tensor.

    name: "nf4" or "fp4" (two codes a byte, one absmax a block), "int8" (one absmax a row: LLM.int8()), or "dynamic8"
    and "dynamic8-unsigned" (optimizer states: one code a byte, one absmax a block of the flattened tensor).
    block_size: elements that share one absmax; 0 for int8, whose block is the row.
    double_quant: 4-bit only; the absmax values are themselves stored in 8 bits.

    Raises ValueError for a combination that does not exist.
    """

    name: str = "nf4"
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.name not in FORMAT_NAMES:
            raise ValueError(f"unknown format {self.name!r}; known: {', '.join(FORMAT_NAMES)}")
        if self.name == "int8":
            if type(self.block_size) is not int or self.block_size != 0:
                raise ValueError(f"int8 has one scale a row: block_size must be 0, got {self.block_size!r}")
        else:
            check_block_size(self.block_size)
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant must be True or False, got {self.double_quant!r}")
        if self.double_quant and not self.is_4bit:
            raise ValueError(f"double quantization exists for nf4 and fp4 only, not for {self.name}")

    @classmethod
    def parse(cls, name: str, block_size: int | None = None, double_quant: bool | None = None) -> Format:
        """A Format from a user's name, with the defaults of that name.

        "nf4" and "fp4" are double-quantized by default, "nf4-plain" and "fp4-plain" are not. The default block size
        is 64 for 4 bits and 256 for dynamic 8-bit.
        """
        if name in _ALIASES:
            name, plain = _ALIASES[name]
            double_quant = plain if double_quant is None else double_quant
        if name in ("nf4", "fp4"):
            return cls(name, 64 if block_size is None else block_size, True if double_quant is None else double_quant)
        default = 0 if name == "int8" else 256
        return cls(name, default if block_size is None else block_size, bool(double_quant))

    @property
    def is_4bit(self) -> bool:
        return self.name in ("nf4", "fp4")

    @property
    def bits(self) -> int:
        return 4 if self.is_4bit else 8

    @property
    def label(self) -> str:
        """The name on the command line: "nf4", "nf4-plain", "int8" ..."""
        return self.name + ("-plain" if self.is_4bit and not self.double_quant else "")

    def block_count(self, shape: Sequence[int]) -> int:
        """How many absmax values a tensor of `shape` has."""
        if self.name == "int8":
            return math.prod(shape[:-1]) if len(shape) else 1
        return -(-math.prod(shape) // self.block_size)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Exact bytes of a tensor of `shape`: codes, block scales, and the scales of the scales."""
        count = math.prod(shape)
        blocks = self.block_count(shape)
        codes = (count + 1) // 2 if self.is_4bit else count
        if not self.double_quant:
            return codes + 4 * blocks
        return codes + blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """Stored bits an element, everything counted; 0 for a tensor without elements."""
        count = math.prod(shape)
        return 8 * self.nbytes(shape) / count if count else 0.0

    def has_row_layout(self, shape: Sequence[int]) -> bool:
        """True where no block crosses a row, so that codes and scales keep the tensor's leading dimensions."""
        return self.name != "int8" and len(shape) > 0 and shape[-1] > 0 and shape[-1] % self.block_size == 0

    def to_json(self) -> dict[str, Any]:
        """Its fields, JSON-safe."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Format:
        """The inverse of `to_json`. Raises ValueError for another type, unknown keys and values that do not exist."""
        if not isinstance(data, dict):
            raise ValueError(f"a format is a JSON object, got {type(data).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(data) - set(known)))
        if unknown:
            raise ValueError(f"a format has no key {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**data)
