"""`KbitConfig`: what to quantize in a model, and how. A plain dataclass; it imports no Hugging Face code."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch

from kbit.formats.spec import Format, check_block_size

QUANT_METHOD = "kbit"
_FORMATS_BY_BITS = {4: ("nf4", "fp4"), 8: ("int8",)}
# Settings that say how stored weights are multiplied: two loads of one checkpoint may differ in them.
RUN_TIME_SETTINGS = ("compute_dtype", "outlier_threshold", "int8_activations")


# What BitsAndBytesConfig calls these settings.
_NAMES_ELSEWHERE = {
    "load_in_4bit": "bits=4",
    "load_in_8bit": "bits=8",
    "bnb_4bit_quant_type": "format",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "llm_int8_threshold": "outlier_threshold",
    "llm_int8_skip_modules": "skip_modules",
}


def parse_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """torch.bfloat16, "bfloat16" or "torch.bfloat16" -> torch.bfloat16; None stays None. ValueError otherwise."""
    if value is None or isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{value!r} is not a torch dtype; use for example torch.bfloat16 or 'bfloat16'")
    return dtype


def check_int8_settings(outlier_threshold: Any, int8_activations: Any) -> None:
    """ValueError unless the threshold is a finite number of at least 0, and int8_activations True, False or None."""
    number = isinstance(outlier_threshold, (int, float)) and not isinstance(outlier_threshold, bool)
    if not number or not 0 <= outlier_threshold < float("inf"):
        raise ValueError(f"outlier_threshold must be a finite number of at least 0, got {outlier_threshold!r}")
    if int8_activations is not None and not isinstance(int8_activations, bool):
        raise ValueError(f"int8_activations must be True, False or None, got {int8_activations!r}")


@dataclasses.dataclass
class KbitConfig:
    """How a model's weights are stored.

    bits: 4 or 8.
    format: "nf4" or "fp4" (4 bits), "int8" (8 bits). None: nf4 for 4 bits, int8 for 8.
    block_size: 4 bits only. Elements that share one scale (32 to 4096).
    double_quant: 4 bits only. Store the scales in 8 bits too (4.127 bits a weight instead of 4.5).
    outlier_threshold: 8 bits only. LLM.int8(): input features with a value of at least this size are multiplied in 16
        bits. 0 turns the decomposition off.
    compute_dtype: dtype of the products; None computes in the input's dtype.
    skip_modules: names or patterns of modules that stay as they are. None skips the output head, [] nothing. A head
        tied to the embedding follows the embedding. A name matches the module, everything below it, and every module
        whose dotted path contains it; `*` and `?` match as in file names.
    quantize_embeddings: nn.Embedding too (and with it a tied head).
    quantize_experts: fused 3-D expert weights too.
    int8_activations: 8 bits only. None: activations are quantized too where there are many tokens, which is faster, and
        left alone at few. True or False: always or never (slower at many tokens, and a little more accurate).

    Raises ValueError for values that do not exist, and for settings that the bits would ignore. `to_dict` and
    `from_dict` are JSON-safe.
    """

    bits: int = 4
    format: str | None = None
    block_size: int = 64
    double_quant: bool = True
    outlier_threshold: float = 6.0
    compute_dtype: torch.dtype | str | None = None
    skip_modules: list[str] | None = None
    quantize_embeddings: bool = False
    quantize_experts: bool = True
    int8_activations: bool | None = None

    # What transformers reads off a quantization config to find its quantizer.
    quant_method = QUANT_METHOD
    _spelled_out = frozenset[str]()  # no annotation: not a field

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note which settings were spelled out: see `asked`. All of them are those of a copy (`dataclasses.replace`,
        `from_dict`), where only what is not the default was asked for."""
        config = super().__new__(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(kwargs.keys() - set(names)):
            name = unknown[0]
            meant = f"use {_NAMES_ELSEWHERE[name]}" if name in _NAMES_ELSEWHERE else f"known: {', '.join(names)}"
            raise TypeError(f"KbitConfig has no setting {name!r}; {meant}")
        given = frozenset([*names[: len(args)], *kwargs])
        config._spelled_out = given if len(given) < len(names) else frozenset()
        return config

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in _FORMATS_BY_BITS:
            raise ValueError(f"bits must be 4 or 8, got {self.bits!r}")
        if self.format is None:
            self.format = _FORMATS_BY_BITS[self.bits][0]
            self._spelled_out -= {"format"}
        self._check_format()
        check_block_size(self.block_size)
        for flag in ("double_quant", "quantize_embeddings", "quantize_experts"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(f"{flag} must be True or False, got {getattr(self, flag)!r}")
        check_int8_settings(self.outlier_threshold, self.int8_activations)
        self._check_bits()
        self.compute_dtype = parse_dtype(self.compute_dtype)
        if self.compute_dtype is not None and not self.compute_dtype.is_floating_point:
            raise ValueError(f"compute_dtype must be a floating point dtype, got {self.compute_dtype}")
        if self.skip_modules is not None:
            if isinstance(self.skip_modules, str) or not all(isinstance(name, str) for name in self.skip_modules):
                raise ValueError(f"skip_modules must be a list of names, got {self.skip_modules!r}")
            self.skip_modules = list(self.skip_modules)

    def _check_format(self) -> None:
        assert self.format is not None
        if self.format in _FORMATS_BY_BITS[self.bits]:
            return
        for bits, names in _FORMATS_BY_BITS.items():
            if self.format in names:
                raise ValueError(
                    f"{self.format!r} is a format of {bits} bits, but bits is {self.bits}: use "
                    f"KbitConfig(bits={bits}, format={self.format!r})"
                )
        known = ", ".join(name for names in _FORMATS_BY_BITS.values() for name in names)
        raise ValueError(f"format must be one of {known}, got {self.format!r}")

    def _check_bits(self) -> None:
        """Refuse what the stored bits would ignore. A threshold of 0 is true of 4 bits too: nothing is taken out."""
        if self.bits == 4 and self.int8_activations is not None:
            raise ValueError(
                f"int8_activations={self.int8_activations} is a setting of 8 bits: 4-bit weights never meet quantized "
                "activations; use bits=8 or leave it out"
            )
        if self.bits == 4 and self.outlier_threshold not in (0, 6):
            raise ValueError(
                f"outlier_threshold={self.outlier_threshold:g} is a setting of 8 bits: 4-bit weights are multiplied in "
                "16 bits whatever the activations are; use bits=8 or leave it out"
            )
        if self.bits == 8 and self.block_size != 64:
            raise ValueError(
                f"block_size={self.block_size} is a setting of 4 bits: int8 weights have one scale a row; use bits=4 "
                "or leave it out"
            )

    @property
    def asked(self) -> frozenset[str]:
        """The settings that were spelled out, or changed since: what stands at its default was not asked for."""
        default = KbitConfig(bits=self.bits)
        names = [field.name for field in dataclasses.fields(default)]
        changed = {name for name in names if getattr(self, name) != getattr(default, name)}
        return frozenset(names) & (self._spelled_out | changed)

    @classmethod
    def from_format(cls, name: str, **kwargs: Any) -> KbitConfig:
        """A config from a command-line format name: nf4, nf4-plain, fp4, fp4-plain or int8."""
        if name not in ("nf4", "nf4-plain", "fp4", "fp4-plain", "int8"):
            raise ValueError(f"{name!r} is not a weight format; use nf4, nf4-plain, fp4, fp4-plain or int8")
        fmt = Format.parse(name)
        return cls(bits=fmt.bits, format=fmt.name, double_quant=fmt.double_quant or not fmt.is_4bit, **kwargs)

    @property
    def weight_format(self) -> Format:
        """The storage of one quantized weight."""
        assert self.format is not None  # set by __post_init__
        if self.format == "int8":
            return Format("int8", 0, False)
        return Format(self.format, self.block_size, self.double_quant)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields, with `quant_method`: what stands in config.json under `quantization_config`."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(KbitConfig)}
        if self.compute_dtype is not None:
            data["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return {"quant_method": QUANT_METHOD, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KbitConfig:
        """The inverse of `to_dict`. Raises ValueError for another quant_method or an unknown key."""
        if not isinstance(data, dict):
            raise ValueError(f"a kbit config is a JSON object, got {type(data).__name__}")
        data = dict(data)
        method = data.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"quant_method is {method!r}, expected {QUANT_METHOD!r}")
        known = {field.name for field in dataclasses.fields(KbitConfig)}
        unknown = sorted(map(str, set(data) - known))
        if unknown:
            raise ValueError(f"unknown keys in a kbit config: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**data)
