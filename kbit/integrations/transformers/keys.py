"""What a kbit checkpoint must hold: missing, left-over, misshapen and mistyped tensors are errors that name the key.

transformers warns about missing keys and fills them with random numbers, ignores left-over ones, and casts dtypes; in
a quantized checkpoint any of these is a damaged file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbit.nn.base import PART_NAMES, QuantizedModule, part_shapes

SCALE_NAMES = PART_NAMES[1:]
_MAX_HEADER = 100 * 2**20
_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def split(key: str, modules: dict[str, QuantizedModule]) -> tuple[str, str] | None:
    """`(module name, part)` where `key` is a part of one of `modules`, else None."""
    name, _, part = key.rpartition(".")
    module = modules.get(name)
    return (name, part) if module is not None and part in module.parts() else None


def expected_part(module: QuantizedModule, part: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one stored part of a quantized module."""
    return part_shapes(module.weight_format, tuple(module.weight_shape))[part]


def stored_shape(module: QuantizedModule, part: str) -> tuple[int, ...]:
    """The shape of a part in a checkpoint that transformers writes.

    int8 codes gain a last dimension of one. Without kbit, transformers does not know the quant_method, warns, and goes
    on: codes `[N, K]` would then load into the float weight as garbage, while this shape stops it with an error.
    """
    shape, dtype = expected_part(module, part)
    return (*shape, 1) if dtype == torch.int8 else shape


def fit(key: str, value: Tensor, module: QuantizedModule, part: str) -> Tensor:
    """`value` as the module holds it. ValueError that names the key where shape or dtype do not fit the format."""
    shape, dtype = expected_part(module, part)
    if value.dtype == dtype and tuple(value.shape) in (shape, stored_shape(module, part)):
        return value.view(shape)
    raise ValueError(_mismatch(key, value.dtype, value.shape, module, part))


def _mismatch(key: str, dtype: object, shape: Sequence[int], module: QuantizedModule, part: str) -> str:
    want = expected_part(module, part)[1]
    return (
        f"{key} is {dtype} {list(shape)} in the checkpoint, but a {module.weight_format.label} weight of "
        f"{list(module.weight_shape)} stores {want} {list(stored_shape(module, part))} there. The checkpoint is "
        "damaged, or its config.json belongs to another one."
    )


def check_headers(files: Iterable[str], modules: dict[str, QuantizedModule], prefix: str) -> None:
    """Compare what safetensors headers say of the quantized weights with what the modules store, before loading.

    Keys are matched as they are, and with the base model's prefix added or dropped. Other files are left to `fit`.
    """
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        for key, entry in _header(Path(file)).items():
            names = (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}")
            place = next((found for found in (split(name, modules) for name in names) if found), None)
            if place is None:
                continue
            module = modules[place[0]]
            shape, dtype = expected_part(module, place[1])
            fits = tuple(entry["shape"]) in (shape, stored_shape(module, place[1]))
            if not fits or _DTYPES.get(entry["dtype"]) != dtype:
                found = _DTYPES.get(entry["dtype"], entry["dtype"])
                raise ValueError(f"{file}: {_mismatch(key, found, entry['shape'], module, place[1])}")


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
        if size > _MAX_HEADER:
            raise ValueError(f"{file} is not a safetensors file")
        entries = json.loads(stream.read(size))
    entries.pop("__metadata__", None)
    return entries


def check_complete(model: Any, modules: dict[str, QuantizedModule], missing: set[str], unexpected: set[str]) -> None:
    """ValueError where a kbit checkpoint lacks keys of the model, or has keys that the model's modules do not take.

    A model class other than the one that was saved may bring a component of its own (a classification head, a pooler):
    where all of it is missing it is new, which transformers reports, and no error.
    """
    if missing and type(model).__name__ not in (model.config.architectures or []):
        missing = missing - _new_components(model, missing)
    if missing:
        raise ValueError(
            f"the checkpoint lacks {_listed(missing)}. It is damaged or incomplete, or its config.json (skip_modules, "
            "quantize_embeddings, number of layers) is not the one that it was saved with."
        )
    present = {name for name, _ in model.named_modules()}
    surplus = set()
    for key in unexpected:
        name, _, last = key.rpartition(".")
        if name in present and (last in SCALE_NAMES or name in modules):
            surplus.add(key)
    if surplus:
        raise ValueError(
            f"the checkpoint holds {_listed(surplus)}, for which this model has no place. Its config.json "
            "(skip_modules, quantize_embeddings, double_quant) is not the one that it was saved with."
        )


def _new_components(model: Any, missing: set[str]) -> set[str]:
    prefix = f"{model.base_model_prefix}."

    def component(key: str) -> str:
        depth = 2 if key.startswith(prefix) else 1
        return ".".join(key.split(".")[:depth])

    present = {component(key) for key in model.state_dict() if key not in missing}
    return {key for key in missing if component(key) not in present}


def _listed(keys: set[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
