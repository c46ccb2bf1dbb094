"""The value tables of every format, exact to the last bit.

* NF4: the 16 quantiles of "QLoRA" (Dettmers et al. 2023, arXiv 2305.14314).
* FP4: a sign, two exponent bits and one mantissa bit, scaled so that the largest value is 1.
* Dynamic 8-bit: the dynamic tree map of "8-bit Optimizers via Block-wise Quantization"
  (Dettmers et al. 2021, arXiv 2110.02861).

Everything here is tiny and lives on the CPU, whatever torch's default device; `codebook` copies a table to a device on
request and keeps the copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Index 0..7; index 8..15 are the negatives (bit 3 is the sign). Twelve times these: 0, 1/16, 8, 12, 4, 6, 2, 3.
_FP4_MAGNITUDES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)
FP4_VALUES = _FP4_MAGNITUDES + tuple(0.0 - v for v in _FP4_MAGNITUDES)  # code 8 is +0, not -0

# Codes in ascending order of value. NF4 is already sorted. FP4 holds zero twice: code 0 comes first, so that zero
# and small negatives round to code 0 and small positives to code 8 (both decode to 0).
_SORTED_CODES = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
_VALUES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}

# The code that an odd element count leaves in the low nibble of the last byte: the code of 0.
PAD_CODE = {"nf4": 7, "fp4": 0}


def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 sorted values of the dynamic 8-bit map, fp32 `[256]`.

    A code spends a unary prefix on the decade (1 down to 1e-6) and what is left on a linear fraction in that decade,
    so the seven decades hold 1, 2, 4 ... 64 values a side (twice as many when unsigned), each the mean of two
    neighbouring boundaries of a linear grid over [0.1, 1]. Zero and one complete the map.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        boundaries = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32, device="cpu")
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        magnitudes = (10 ** (decade - 6)) * means
        values.append(magnitudes)
        if signed:
            values.append(-magnitudes)
    return torch.cat(values).sort().values


def _built_once(build: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Cache a table, built as an ordinary tensor even where its first use happens in inference mode."""
    return functools.cache(torch.inference_mode(False)(build))


@_built_once
def _table(name: str) -> Tensor:
    """fp32 values by code: `[16]` for nf4 and fp4, `[256]` for dynamic8 and dynamic8-unsigned."""
    if name in _VALUES:
        return torch.tensor(_VALUES[name], dtype=torch.float32, device="cpu")
    if name == "dynamic8":
        return dynamic_map(signed=True)
    if name == "dynamic8-unsigned":
        return dynamic_map(signed=False)
    raise ValueError(f"unknown codebook {name!r}; known: nf4, fp4, dynamic8, dynamic8-unsigned")


@_built_once
def _pair_table(name: str) -> Tensor:
    """fp32 `[256, 2]`: the two values that one packed byte decodes to, high nibble first."""
    values = _table(name)
    byte = torch.arange(256, device="cpu")
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).contiguous()


@_built_once
def _midpoints(name: str) -> Tensor:
    """fp32 midpoints between neighbouring sorted values: `[15]` or `[255]`."""
    ordered = _table(name)[_sorted_codes(name).long()]
    return (ordered[:-1] + ordered[1:]) / 2


@_built_once
def _sorted_codes(name: str) -> Tensor:
    """uint8 codes in ascending order of value."""
    if name in _SORTED_CODES:
        return torch.tensor(_SORTED_CODES[name], dtype=torch.uint8, device="cpu")
    return torch.arange(256, device="cpu").to(torch.uint8)


@_built_once
def _zero_code(name: str) -> Tensor:
    """int32 scalar: the code that decodes to 0."""
    return (_table(name) == 0).nonzero()[0, 0].int()


_TABLES = {
    "values": _table,
    "pairs": _pair_table,
    "midpoints": _midpoints,
    "sorted_codes": _sorted_codes,
    "zero_code": _zero_code,
}
_copies: dict[tuple[str, str, torch.device], Tensor] = {}


def codebook(name: str, device: torch.device | str = "cpu", kind: str = "values") -> Tensor:
    """A table of `name` on `device`; do not write to it.

    kind: "values" (fp32 by code), "pairs" (fp32 `[256, 2]` by packed byte), "midpoints" (fp32 between sorted values),
    "sorted_codes" (uint8 codes in ascending order of value) or "zero_code" (int32 scalar, the code of 0).
    Raises ValueError for an unknown name or kind.
    """
    if kind not in _TABLES:
        raise ValueError(f"unknown kind of table {kind!r}; known: {', '.join(_TABLES)}")
    device = torch.device(device)
    if device.type == "cpu":
        return _TABLES[kind](name)
    key = (kind, name, device)
    if key not in _copies:
        with torch.inference_mode(False):
            _copies[key] = _TABLES[kind](name).to(device)
    return _copies[key]
