"""Checkpoints whose quantized weights are laid out in another way than the model's modules, read weight by weight.

Two kinds: bitsandbytes' layout (any model), and experts that were saved one by one (transformers 4, either layout) for
a model that holds them fused (transformers 5). Codes and scales are taken as they are: nothing is quantized again.

A fused weight has one nested offset where single experts had one each, so their block scales are decoded to fp32,
exactly. The whole model then has plain scales, since a model has one format: 0.37 bits a weight more than on disk.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kbit.checkpoint import bnb
from kbit.formats.packing import layout_shapes
from kbit.formats.spec import Format
from kbit.formats.tensor import QuantizedTensor
from kbit.integrations.transformers.config import BITSANDBYTES, KbitConfig
from kbit.nn.base import QuantizedModule, part_shapes, to_parts
from kbit.nn.experts import ExpertWeight
from kbit.nn.select import is_linear, output_heads, select_experts, select_modules
from kbit.ops import dequantize

_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
# What transformers may report as unexpected, since it looks for no module behind it.
_LEFT_OVER = re.compile(
    r".+\.(absmax|quant_map|nested_absmax|nested_quant_map|nested_offset|SCB|weight_format|quant_state\.bitsandbytes__\w+)"
)
# Origins of one weight of the model, in the order in which they are fused: a list for each pattern, expert by expert.
Origins = list[list[str]]


class Weights:
    """The quantized weights in a checkpoint's safetensors files, by the name that their codes have there."""

    def __init__(self, files: Iterable[str], bitsandbytes: bool) -> None:
        self.bitsandbytes = bitsandbytes
        self._file_of: dict[str, str] = {}
        for file in map(str, files):
            if not file.endswith(".safetensors"):
                raise ValueError(f"{file}: quantized weights are read from safetensors files only")
            with safe_open(file, framework="pt") as opened:
                self._file_of.update(dict.fromkeys(opened.keys(), file))
        self.groups = bnb.group_keys(self._file_of) if bitsandbytes else self._native_groups()

    def _native_groups(self) -> dict[str, dict[str, str]]:
        groups = {}
        for key in self._file_of:
            name = key.removesuffix(".weight")
            if name != key and f"{name}.absmax" in self._file_of:
                parts = ("weight", "absmax", "nested_absmax", "nested_offset")
                groups[key] = {part: f"{name}.{part}" for part in parts if f"{name}.{part}" in self._file_of}
        return groups

    def tensor(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor of the checkpoint, as it is stored."""
        with safe_open(self._file_of[key], framework="pt", device=str(device)) as opened:
            value: Tensor = opened.get_tensor(key)
            return value

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        fmt: Format,
        device: torch.device | str = "cpu",
        codes: Tensor | None = None,
    ) -> QuantizedTensor:
        """The weight `name` on `device`. shape, fmt: of a native one. codes: its codes, where they were read already.

        Raises ValueError that names the key for missing or extra parts, wrong shapes and dtypes, damaged metadata.
        """
        parts = {part: key for part, key in self.groups[name].items() if codes is None or part != "weight"}
        # Blobs are parsed on the CPU: a few bytes, that would be copied back from a device one by one.
        blobs = {p for p in parts if p.startswith(bnb.BLOB_PREFIX)}
        tensors = {part: self.tensor(key, "cpu" if part in blobs else device) for part, key in parts.items()}
        if codes is not None:
            tensors["weight"] = codes
        return bnb.decode(name, tensors) if self.bitsandbytes else _native_weight(name, tensors, shape, fmt)

    def format(self, name: str) -> Format:
        """The storage of one weight, from its header and metadata alone."""
        parts = self.groups[name]
        if "SCB" in parts or "weight_format" in parts:
            return Format("int8", 0, False)
        blobs = {part: self.tensor(key) for part, key in parts.items() if part.startswith(bnb.BLOB_PREFIX)}
        return bnb.read_metadata(name, blobs).format


def _native_weight(name: str, tensors: dict[str, Tensor], shape: tuple[int, ...], fmt: Format) -> QuantizedTensor:
    """A weight of `shape` in `fmt` from the parts that kbit's own layers save. ValueError where they do not fit."""
    expected = part_shapes(fmt, shape)
    if set(tensors) != set(expected):
        found, wanted = ", ".join(sorted(tensors)), ", ".join(expected)
        raise ValueError(f"{name} has the parts {found}; a {fmt.label} weight has {wanted}")
    parts = {}
    for part, (size, dtype) in expected.items():
        value = tensors[part]
        if value.dtype != dtype or value.numel() != math.prod(size):
            key = f"{name.removesuffix('.weight')}.{part}"
            raise ValueError(
                f"{key} is {value.dtype} {list(value.shape)}, a {fmt.label} {list(shape)} has {dtype} {size}"
            )
        parts[part] = value.view(size).view(torch.float32) if dtype == torch.int32 else value.view(size)
    return QuantizedTensor(parts.pop("weight"), shape=torch.Size(shape), dtype=torch.float32, format=fmt, **parts)


# ---- which weight of the model is which in the checkpoint ----


def locate(model: Any, names: Iterable[str]) -> dict[str, Origins]:
    """The checkpoint's `names` by the weight of `model` (before it was changed) that they lead to."""
    meta = dict(model.state_dict())
    prefix = model.base_model_prefix
    rename, order = _renaming(model, meta, prefix)
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=_natural):
        target, pattern = rename(name)
        found.setdefault(target, {}).setdefault(pattern or "", []).append(name)
    return {
        target: [patterns[pattern] for pattern in sorted(patterns, key=lambda p: order.get(p, 0))]
        for target, patterns in found.items()
    }


def _renaming(model: Any, meta: dict[str, Tensor], prefix: str) -> tuple[Any, dict[str, int]]:
    """How a key of the checkpoint becomes one of the model, with the pattern that fuses it; and the patterns' order."""
    try:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4 adds or drops the base model's prefix, and fuses nothing

        def simple(name: str) -> tuple[str, str | None]:
            candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
            return next((c for c in candidates if c in meta), name), None

        return simple, {}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    order = {pattern: i for entry in converters for i, pattern in enumerate(entry.source_patterns)}

    def rename(name: str) -> tuple[str, str | None]:
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, meta)
        if target not in meta and name in meta:
            target, pattern = loading.rename_source_key(name, [], [], prefix, meta)
        return target, pattern

    return rename, order


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


class Foreign:
    """A checkpoint in another layout, matched with a model: where each quantized weight comes from.

    model: before its modules are replaced. config: of the checkpoint; `self.config` is what the model gets.
    Raises ValueError where the checkpoint holds quantized weights for which the model has no layer of that kind.
    """

    def __init__(self, model: Any, weights: Weights, config: KbitConfig) -> None:
        for name, parts in weights.groups.items():
            if "weight" not in parts:
                raise ValueError(f"{name} is missing, but parts of it are there: {', '.join(sorted(parts))}")
        self.weights = weights
        self.stored = config.weight_format  # of native weights
        self.origins = locate(model, weights.groups)
        # Weights that are quantized in the checkpoint and never in kbit (routers): they are dequantized.
        self.floats: set[str] = set()
        self.config = copy.copy(config)
        self.config.layout = "native"
        fused = {f"{target}.weight": o for target, o in self.origins.items() if target in select_experts(model, config)}
        if weights.bitsandbytes:
            self._settle_config(model, fused)
        if fused and self.config.weight_format.double_quant:
            self.config.double_quant = False  # and with it every weight is read here, for its decoded scales
        elif not weights.bitsandbytes:
            self.origins = {}
        for target in fused:
            self.origins.pop(target.removesuffix(".weight"), None)
        self.origins.update(fused)

    def _settle_config(self, model: nn.Module, fused: dict[str, Origins]) -> None:
        """Take format and block size from the weights, and skip whatever is not quantized in the checkpoint."""
        if not self.weights.groups:
            raise ValueError(
                "config.json says that this checkpoint is quantized by bitsandbytes, but none of its weights is: "
                "remove quantization_config there, or save the quantized model again"
            )
        formats = {self.weights.format(name): name for name in reversed(self.weights.groups)}
        if len(formats) > 1:
            told = ", ".join(f"{name}: {fmt}" for fmt, name in formats.items())
            raise ValueError(f"the checkpoint's weights are in several formats, a model holds one ({told})")
        fmt = next(iter(formats))
        if fmt.bits != self.config.bits:
            raise ValueError(f"config.json says {self.config.bits} bits, but {formats[fmt]} is stored as {fmt}")
        if fmt.is_4bit:
            self.config.format, self.config.block_size = fmt.name, fmt.block_size
            self.config.double_quant = fmt.double_quant
        wanted = self.config.wanted_block_size
        if wanted is not None and wanted != self.config.block_size:
            raise ValueError(
                f"the checkpoint is stored as {fmt}, quantization_config asks for block_size={wanted}: leave it out"
            )
        self.config.quantize_experts = bool(fused)
        everything = copy.copy(self.config)
        everything.skip_modules = []
        chosen = select_modules(model, everything)
        stored = {name for name in chosen if f"{name}.weight" in self.origins}
        places = dict(model.named_modules())
        for target, origin in self.origins.items():
            module = target.removesuffix(".weight")
            if module not in places or module in stored or f"{target}.weight" in fused:
                continue
            if not _holds_weight(places[module]):
                kind = type(places[module]).__name__
                raise ValueError(
                    f"{origin[0][0]} is quantized in the checkpoint, but {module} is a {kind} of this model"
                )
            self.floats.add(target)
        default = select_modules(model, self.config)
        if set(default) != stored:
            left = [name for name in chosen if name not in stored]
            heads = output_heads(model)
            left += [n for n, m in places.items() if m in heads and is_linear(m) and n not in chosen]
            self.config.skip_modules = sorted(set(left))

    def has(self, name: str) -> bool:
        """Whether the weight of the model's module `name` comes from here."""
        return f"{name}.weight" in self.origins

    def parts(self, name: str, module: QuantizedModule, device: Any, codes: Tensor | None = None) -> dict[str, Tensor]:
        """The Parameters of the model's module `name`, on `device`; see `Weights.read`."""
        origins = self.origins[f"{name}.weight"]
        if isinstance(module, ExpertWeight):
            return self._fused(name, module, origins, device)
        usable = codes is not None and codes.dtype in (torch.uint8, torch.int8) and not codes.is_meta
        shape = tuple(module.weight_shape)
        q = self.weights.read(origins[0][0], shape, self.stored, device, codes if usable else None)
        if q.shape != module.weight_shape:
            raise ValueError(
                f"{origins[0][0]} holds a weight of {list(q.shape)}, but this model's {name} has "
                f"{list(module.weight_shape)}: the checkpoint is damaged, or config.json is of another model"
            )
        if q.format.is_4bit and self.weights.bitsandbytes:
            module.weight_dtype = q.dtype
        q = _with_plain_scales(q) if q.format != module.weight_format else q
        return to_parts(q)

    def dequantized(self, target: str, device: Any, like: Tensor) -> nn.Parameter:
        """The floating point Parameter `target` of the model (in `self.floats`), in the dtype that `like` has."""
        q = self.weights.read(self.origins[target][0][0], tuple(like.shape), self.stored, device)
        dtype = like.dtype if like.dtype.is_floating_point else q.dtype
        return nn.Parameter(dequantize(q, dtype))

    def _fused(self, name: str, module: ExpertWeight, origins: Origins, device: Any) -> dict[str, Tensor]:
        """One projection of all experts from their single weights; gate and up become one, in this order."""
        experts, n, k = module.weight_shape
        if module.transposed or {len(single) for single in origins} != {experts} or n % len(origins):
            counts = ", ".join(str(len(single)) for single in origins)
            raise ValueError(f"{name} fuses {experts} experts [{n}, {k}]; the checkpoint holds {counts} single weights")
        rows, fmt = n // len(origins), module.weight_format
        if fmt.is_4bit and rows * k % fmt.block_size:
            raise ValueError(f"{name}: blocks of {fmt.block_size} do not end with an expert's {rows} x {k} weights")
        codes_shape, scales_shape = layout_shapes(fmt, tuple(module.weight_shape))
        codes_dtype = torch.uint8 if fmt.is_4bit else torch.int8
        codes = torch.empty(codes_shape, dtype=codes_dtype, device=device)
        absmax = torch.empty(scales_shape, dtype=torch.float32, device=device)
        code_rows = codes.view(experts, len(origins), -1)
        scale_rows = absmax.view(experts, len(origins), -1)
        for place, single in enumerate(origins):
            for expert, origin in enumerate(single):
                q = _with_plain_scales(self.weights.read(origin, (rows, k), self.stored, device))
                if tuple(q.shape) != (rows, k) or q.format != fmt:
                    raise ValueError(f"{origin} is {q.format} {list(q.shape)}, expected {fmt.label} {[rows, k]}")
                if self.weights.bitsandbytes and q.format.is_4bit:
                    module.weight_dtype = q.dtype
                code_rows[expert, place] = q.codes.reshape(-1)
                scale_rows[expert, place] = q.absmax.reshape(-1)
        return {"weight": codes, "absmax": absmax.view(torch.int32)}

    def refuse_offloaded(self, name: str, weight: Tensor) -> None:
        """ValueError where `weight` would stay on disk: what lies there are the bytes of the other layout."""
        if weight.is_meta:
            raise ValueError(
                f"{name} would be offloaded to disk, which a checkpoint in this layout cannot be: load it once with "
                "enough memory, save_pretrained it in kbit's own layout, and offload that"
            )

    def unexpected(self, keys: Iterable[str]) -> set[str]:
        """`keys` without those that are read here, under their own name or with another prefix."""
        left = {key for key in keys if not (self.weights.bitsandbytes and _LEFT_OVER.fullmatch(key))}
        singles = {_expert_path(o) for fused in self.origins.values() for single in fused for o in single}
        nested = (".nested_absmax", ".nested_offset")  # of other weights whose scales are decoded here
        left = {key for key in left if not (key.endswith(nested) and self.has(key.rpartition(".")[0]))}
        return {key for key in left if _expert_path(key) is None or _expert_path(key) not in singles}


def _expert_path(key: str) -> str | None:
    """`experts.3.w1` of a part of a single expert, under whatever name its layer goes; else None."""
    match = _SINGLE_EXPERT.search(key)
    return key[match.start() + 1 :].rpartition(".")[0] if match else None


def _holds_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.is_floating_point()


def _with_plain_scales(q: QuantizedTensor) -> QuantizedTensor:
    """The same weight with its block scales in fp32, decoded exactly where they were double-quantized."""
    if q.nested_absmax is None or q.nested_offset is None:
        return q
    absmax = torch.ops.kbit.dequantize_absmax(q.absmax, q.nested_absmax, q.nested_offset)
    return QuantizedTensor(q.codes, absmax, q.shape, q.dtype, Format(q.format.name, q.format.block_size, False))


def open_checkpoint(model: Any, config: KbitConfig, files: list[str] | None) -> Foreign | None:
    """What has to be read here of the checkpoint `files` (None: where the model's config says it lies), if anything."""
    if config.layout == BITSANDBYTES:
        return Foreign(model, Weights(files or _files_of(model.config), bitsandbytes=True), config)
    if not files or not select_experts(model, config) or not all(str(f).endswith(".safetensors") for f in files):
        return None
    weights = Weights(files, bitsandbytes=False)
    return Foreign(model, weights, config) if any(map(_SINGLE_EXPERT.search, weights.groups)) else None


def _files_of(config: Any) -> list[str]:
    """The safetensors files of the checkpoint that a config was read from (transformers 4 does not tell them)."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    where = config._name_or_path
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    at = {"revision": getattr(config, "_commit_hash", None), "_commit_hash": getattr(config, "_commit_hash", None)}
    index = cached_file(where, SAFE_WEIGHTS_INDEX_NAME, **quiet, **at)
    if index is not None:
        return list(get_checkpoint_shard_files(where, index, **at)[0])
    single = cached_file(where, SAFE_WEIGHTS_NAME, **quiet, **at)
    if single is None:
        raise ValueError(f"{where} holds no safetensors file, and bitsandbytes checkpoints are read from these only")
    return [single]
