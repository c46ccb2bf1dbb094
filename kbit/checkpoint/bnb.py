"""bitsandbytes' checkpoint layout: which keys store a quantized weight, and what the bytes of each mean.

4-bit, for a weight called W (`model.layers.0.self_attn.q_proj.weight`), shape `[N, K]` of n elements in B blocks:
    W                                   uint8 `[(n + 1) // 2, 1]`, or the same bytes as int8, bf16, fp16, fp32 or fp64
    W.absmax                            fp32 `[B]`; uint8 `[B]` when nested (double-quantized)
    W.quant_map                         fp32 `[16]`, the codebook
    W.nested_absmax, W.nested_quant_map fp32 `[ceil(B / 256)]` and `[256]`; nested only
    W.quant_state.bitsandbytes__nf4     uint8: JSON with the block size, dtype and shape (or `__fp4`)
8-bit: W int8 `[N, K]`, and beside it `SCB` fp32 `[N]` (row absmax) and `weight_format` (uint8 scalar 0: row-major).
The codes are those of the native layout: converting is a reshape.

Everything read here comes from a file that somebody else wrote: whatever does not fit is a ValueError that names it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kbit.config import KbitConfig
from kbit.formats.codebooks import codebook
from kbit.formats.packing import layout_shapes
from kbit.formats.spec import BLOCK_SIZES, NESTED_BLOCK_SIZE, Format
from kbit.formats.tensor import QuantizedTensor

BLOB_PREFIX = "quant_state.bitsandbytes__"
WEIGHT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORAGE_DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Layouts of the int8 codes that old versions wrote, by the value of `weight_format`.
INT8_LAYOUTS = {0: "row", 1: "col32", 2: "col_turing", 3: "col_ampere"}
_MAX_BLOB = 4096
_PLAIN_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_PARTS = re.compile(
    rf"(?P<name>.+)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|nested_offset|{re.escape(BLOB_PREFIX)}\w+)"
)
_INT8_PARTS = re.compile(r"(?P<module>.+)\.(?P<part>SCB|weight_format)")


# ---- the metadata blob ----


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the JSON blob beside a 4-bit weight says. `offset` is None unless the block scales are nested."""

    quant_type: str
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: float | None = None

    @property
    def format(self) -> Format:
        return Format(self.quant_type, self.block_size, self.offset is not None)


def pack_json(values: Mapping[str, Any]) -> Tensor:
    """A JSON-safe mapping as the uint8 tensor that bitsandbytes writes; key order is kept."""
    return torch.frombuffer(bytearray(json.dumps(dict(values)).encode()), dtype=torch.uint8).clone()


def unpack_json(blob: Tensor, where: str = "the quant_state blob") -> dict[str, Any]:
    """The mapping in a uint8 tensor. ValueError that names `where` for anything but one small JSON object."""
    if not isinstance(blob, Tensor) or blob.dtype != torch.uint8 or blob.dim() > 1 or blob.numel() > _MAX_BLOB:
        found = f"{blob.dtype} {list(blob.shape)}" if isinstance(blob, Tensor) else type(blob).__name__
        raise ValueError(f"{where} must be a flat uint8 tensor that holds JSON, found {found}")
    if blob.is_meta:
        raise ValueError(f"{where} is on the meta device: its bytes are needed to read the weight")
    try:
        values = json.loads(bytes(blob.reshape(-1).cpu().tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): the checkpoint is truncated or damaged") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds a JSON {type(values).__name__}, not an object")
    return values


def check_fields(values: Mapping[str, Any], where: str) -> Metadata:
    """The validated content of a blob. A `nested_offset` may be a number or a tensor of one element of any dtype.

    ValueError that names `where` and the field for a missing, unknown or impossible one.
    """
    nested = any(name in values for name in _NESTED_FIELDS)
    wanted = _PLAIN_FIELDS + (_NESTED_FIELDS if nested else ())
    missing = [name for name in wanted if name not in values]
    unknown = sorted(set(values) - set(_PLAIN_FIELDS + _NESTED_FIELDS))
    if missing or unknown:
        problems = [f"lacks {', '.join(missing)}"] if missing else []
        problems += [f"has unknown fields {', '.join(unknown)}"] if unknown else []
        raise ValueError(f"{where} {' and '.join(problems)}: it is damaged or from a later version")
    quant_type, block_size, shape = values["quant_type"], values["blocksize"], values["shape"]
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"{where}: quant_type must be nf4 or fp4, found {quant_type!r}")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(f"{where}: blocksize must be one of {', '.join(map(str, BLOCK_SIZES))}, found {block_size!r}")
    if not isinstance(values["dtype"], str) or values["dtype"] not in WEIGHT_DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(WEIGHT_DTYPES)}, found {values['dtype']!r}")
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{where}: shape must be a list of sizes, found {shape!r}")
    offset = _check_nested(values, where) if nested else None
    return Metadata(quant_type, block_size, WEIGHT_DTYPES[values["dtype"]], tuple(shape), offset)


def _check_nested(values: Mapping[str, Any], where: str) -> float:
    """The offset of the nested block scales, in fp32 range."""
    size, dtype, offset = (values[name] for name in _NESTED_FIELDS)
    if size != NESTED_BLOCK_SIZE:
        raise ValueError(f"{where}: nested_blocksize must be {NESTED_BLOCK_SIZE}, found {size!r}")
    if not isinstance(dtype, str) or dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{where}: nested_dtype must be a floating point dtype, found {dtype!r}")
    if isinstance(offset, Tensor) and offset.numel() == 1 and offset.is_floating_point():
        offset = offset.item()
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
        if isinstance(offset, float) and math.isnan(offset) and 0 in values["shape"]:
            return 0.0  # what bitsandbytes writes for a tensor without elements: the mean of nothing
        raise ValueError(f"{where}: nested_offset must be a finite number, found {offset!r}")
    return float(offset)


def fields(meta: Metadata) -> dict[str, Any]:
    """The JSON fields in the order in which bitsandbytes writes them."""
    values: dict[str, Any] = {
        "quant_type": meta.quant_type,
        "blocksize": meta.block_size,
        "dtype": str(meta.dtype).removeprefix("torch."),
        "shape": list(meta.shape),
    }
    if meta.offset is not None:
        values |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": meta.offset}
    return values


# ---- one weight ----


def group_keys(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The quantized weights among `keys`: `{weight name: {part: key}}`, with the part "weight" where its key is there.

    Parts of 4-bit weights are named as in the module docstring ("quant_state.bitsandbytes__nf4" included); those of
    8-bit weights are "SCB" and "weight_format". Keys that belong to no quantized weight are left out.
    """
    keys = set(keys)
    groups: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        match, int8 = _PARTS.fullmatch(key), _INT8_PARTS.fullmatch(key)
        if match:
            groups.setdefault(match["name"], {})[match["part"]] = key
        elif int8:
            groups.setdefault(f"{int8['module']}.weight", {})[int8["part"]] = key
    for name, parts in groups.items():
        if name in keys:
            parts["weight"] = name
    return groups


def from_tensors(tensors: Mapping[str, Tensor], module: str, dtype: torch.dtype | None = None) -> QuantizedTensor:
    """The weight of `module` from the tensors of a checkpoint, by their full keys; see `decode`."""
    name = f"{module}.weight"
    own = [key for key in tensors if key.startswith(f"{module}.") and key != f"{module}.bias"]
    groups = group_keys(own)
    if name not in groups:
        raise ValueError(f"{name} is not quantized: there is no {name}.{BLOB_PREFIX}nf4 (or fp4) and no {module}.SCB")
    return decode(name, {part: tensors[key] for part, key in groups[name].items()}, dtype)


def decode(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> QuantizedTensor:
    """Read one quantized weight.

    name: of the weight, for errors. tensors: its parts, as `group_keys` names them.
    dtype: of the dequantized weight. 4-bit checkpoints store it (None reads it there); 8-bit ones do not (fp16 then).
    Returns a QuantizedTensor in kbit's own layout; `kbit.nn.base.to_parts` turns it into module Parameters.

    Raises ValueError that names the key for missing or extra parts, wrong shapes or dtypes, values that are not
    finite, a damaged metadata blob, and layouts that only old GPUs' kernels could read.
    """
    if "weight" not in tensors:
        raise ValueError(f"{name} is missing, but parts of it are there: {', '.join(sorted(tensors))}")
    if "SCB" in tensors or "weight_format" in tensors:
        return _decode_8bit(name, tensors, dtype)
    return _decode_4bit(name, tensors, dtype)


def _decode_4bit(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> QuantizedTensor:
    meta = read_metadata(name, tensors)
    fmt = meta.format
    check_parts(name, meta, tensors)
    codes_shape, scales_shape = layout_shapes(fmt, meta.shape)
    packed = as_bytes(tensors["weight"]).view(codes_shape)
    absmax = tensors["absmax"].reshape(scales_shape)
    shape, dtype = torch.Size(meta.shape), dtype or meta.dtype
    if not fmt.double_quant:
        return QuantizedTensor(packed, absmax.float(), shape, dtype, fmt)
    if not same_table(tensors["nested_quant_map"], "dynamic8"):
        raise ValueError(f"{name}.nested_quant_map is not the signed dynamic map; kbit cannot decode its block scales")
    nested_offset = torch.tensor([meta.offset], dtype=torch.float32, device=packed.device)
    nested_absmax = tensors["nested_absmax"].float().reshape(-1)
    return QuantizedTensor(packed, absmax, shape, dtype, fmt, nested_absmax, nested_offset)


def read_metadata(name: str, tensors: Mapping[str, Any]) -> Metadata:
    """The metadata of a 4-bit weight from its parts; the blob's key must agree with what is in it."""
    blobs = sorted(part for part in tensors if part.startswith(BLOB_PREFIX))
    if len(blobs) != 1:
        found = f"found {', '.join(blobs)}" if blobs else "there is none"
        raise ValueError(f"{name} needs exactly one {BLOB_PREFIX}nf4 or {BLOB_PREFIX}fp4 beside it, {found}")
    where = f"{name}.{blobs[0]}"
    values = unpack_json(tensors[blobs[0]], where)
    if isinstance(tensors.get("nested_offset"), Tensor):  # other tools keep the offset as a tensor of its own
        values.setdefault("nested_offset", tensors["nested_offset"])
    meta = check_fields(values, where)
    if blobs[0] != BLOB_PREFIX + meta.quant_type:
        raise ValueError(f"{where} says that the weight is {meta.quant_type}: the blob or its key is damaged")
    return meta


def check_parts(name: str, meta: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where the parts of a 4-bit weight are not exactly what its metadata needs, in shape and dtype."""
    nested = meta.offset is not None
    wanted = {"weight", "absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    there = {part for part in tensors if not part.startswith(BLOB_PREFIX) and part != "nested_offset"}
    for problem, parts in (("lacks", wanted - there), ("has the extra", there - wanted)):
        if parts:
            kind = "nested" if nested else "not nested"
            listed = ", ".join(f"{name}.{part}" for part in sorted(parts))
            raise ValueError(f"the 4-bit weight {name} ({kind}) {problem} {listed}: the checkpoint is damaged")
    count = math.prod(meta.shape)
    blocks = -(-count // meta.block_size)
    weight = tensors["weight"]
    if weight.dtype not in STORAGE_DTYPES or weight.nbytes != (count + 1) // 2:
        raise ValueError(
            f"{name} is {weight.dtype} {list(weight.shape)} ({weight.nbytes} bytes), but {meta.quant_type} codes of "
            f"{list(meta.shape)} take {(count + 1) // 2} bytes: the checkpoint is damaged"
        )
    sizes = {"absmax": blocks, "quant_map": 16}
    if nested:
        sizes |= {"nested_absmax": -(-blocks // NESTED_BLOCK_SIZE), "nested_quant_map": 256}
    for part, size in sizes.items():
        _check_values(f"{name}.{part}", tensors[part], size, coded=nested and part == "absmax")
    if not same_table(tensors["quant_map"], meta.quant_type):
        raise ValueError(f"{name}.quant_map is not the {meta.quant_type} codebook, so its codes mean something else")


def _check_values(key: str, tensor: Tensor, size: int, coded: bool) -> None:
    """ValueError unless `tensor` holds `size` uint8 codes, or `size` finite floating point values."""
    if tensor.numel() != size or not (tensor.dtype == torch.uint8 if coded else tensor.is_floating_point()):
        kind = "uint8 codes" if coded else "floating point values"
        raise ValueError(
            f"{key} is {tensor.dtype} {list(tensor.shape)}, expected {size} {kind}: the checkpoint is damaged"
        )
    if not coded and not tensor.is_meta and not bool(tensor.isfinite().all()):
        raise ValueError(f"{key} holds values that are not finite: the checkpoint is damaged")


def same_table(table: Tensor, name: str) -> bool:
    """True where a stored codebook is the one called `name`, but for a last bit that versions of torch disagree on."""
    if table.is_meta:
        return True
    ours = codebook(name, table.device)
    tolerance = 1e-6 if table.dtype == torch.float32 else 1e-2
    return table.numel() == ours.numel() and torch.allclose(table.float().reshape(-1), ours, rtol=tolerance, atol=1e-9)


def as_bytes(weight: Tensor) -> Tensor:
    """The packed codes of a 4-bit weight as flat uint8, whatever dtype stores them. No value is ever converted."""
    flat = weight.detach().reshape(-1)
    return flat if flat.dtype == torch.uint8 else flat.contiguous().view(torch.uint8)


def _decode_8bit(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> QuantizedTensor:
    module = name.removesuffix(".weight")
    extra = sorted(set(tensors) - {"weight", "SCB", "weight_format"})
    if extra:
        raise ValueError(f"{name} has both 8-bit and 4-bit parts ({', '.join(extra)}): the checkpoint is damaged")
    if "SCB" not in tensors:
        raise ValueError(f"{module}.SCB, the row scales of {name}, is missing")
    weight, scales = tensors["weight"], tensors["SCB"]
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"{name} is {weight.dtype} {list(weight.shape)}, but {module}.SCB says that it is int8 [N, K]")
    check_weight_format(tensors.get("weight_format"), f"{module}.weight_format")
    _check_values(f"{module}.SCB", scales, weight.shape[0], coded=False)
    fmt = Format("int8", 0)
    return QuantizedTensor(weight.contiguous(), scales.float().reshape(-1), weight.shape, dtype or torch.float16, fmt)


def check_weight_format(value: Tensor | None, where: str) -> None:
    """ValueError unless the int8 codes are stored row by row, as current versions do."""
    code = 0 if value is None else int(value)
    if code != 0:
        layout = INT8_LAYOUTS.get(code, "unknown")
        raise ValueError(
            f"{where} is {code} ({layout}): the codes are in a layout for one generation of GPUs, which only the "
            "bitsandbytes that wrote them can read. Quantize the original model again."
        )


def to_tensors(q: QuantizedTensor, module: str) -> dict[str, Tensor]:
    """The tensors, by key and in its order, that bitsandbytes stores for the weight `q` of `module`.

    Nothing is shared with the codebooks, so that every tensor can be saved. ValueError for a format that bitsandbytes
    does not have.
    """
    name = f"{module}.weight"
    if q.format.name == "int8" and len(q.shape) == 2:
        layout = torch.zeros((), dtype=torch.uint8)
        return {name: q.codes, f"{module}.SCB": q.absmax, f"{module}.weight_format": layout}
    if not q.format.is_4bit:
        raise ValueError(f"bitsandbytes has no checkpoint layout for {q.format.label} {list(q.shape)} ({name})")
    dtype = q.dtype if q.dtype in WEIGHT_DTYPES.values() else torch.float32
    offset = float(q.nested_offset.item()) if q.nested_offset is not None else None
    meta = Metadata(q.format.name, q.format.block_size, dtype, tuple(q.shape), offset)
    device = q.codes.device
    parts = {
        name: q.codes.reshape(-1, 1),
        f"{name}.absmax": q.absmax.reshape(-1),
        f"{name}.quant_map": codebook(meta.quant_type, device).clone(),
    }
    if q.nested_absmax is not None:
        parts[f"{name}.nested_absmax"] = q.nested_absmax
        parts[f"{name}.nested_quant_map"] = codebook("dynamic8", device).clone()
    parts[f"{name}.{BLOB_PREFIX}{meta.quant_type}"] = pack_json(fields(meta))
    return parts


# ---- config.json ----


def check_config(config: KbitConfig) -> None:
    """ValueError for settings that a checkpoint in this layout cannot say."""
    if config.quantize_embeddings:
        raise ValueError("the bitsandbytes layout has no quantized embeddings; use the native layout")


def config_dict(config: KbitConfig, skipped: list[str] | None) -> dict[str, Any]:
    """What stands in config.json under `quantization_config`. skipped: names of linear layers that stay as they are."""
    four = config.weight_format.is_4bit
    compute = config.compute_dtype or torch.bfloat16
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": config.weight_format.name if four else "fp4",
        "bnb_4bit_use_double_quant": config.weight_format.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": config.outlier_threshold,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }


def kbit_config(data: Mapping[str, Any]) -> KbitConfig:
    """The KbitConfig that loads a checkpoint whose config.json says `quant_method: "bitsandbytes"`.

    The block size is not in there: every weight's own metadata has it. A compute dtype of float32, which transformers
    writes when nobody chose one, becomes None: compute in the input's dtype. ValueError for a config that is not of
    bitsandbytes, or whose weights are not quantized on disk.
    """
    method = data.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ValueError(f"quant_method is {method!r}, expected 'bitsandbytes'")
    four = bool(data.get("load_in_4bit", data.get("_load_in_4bit", False)))
    eight = bool(data.get("load_in_8bit", data.get("_load_in_8bit", False)))
    if four == eight:
        raise ValueError("exactly one of load_in_4bit and load_in_8bit must be true in a bitsandbytes config")
    if data.get("llm_int8_has_fp16_weight"):
        raise ValueError("llm_int8_has_fp16_weight keeps the weights in 16 bits, so there is nothing quantized to load")
    skip = data.get("llm_int8_skip_modules")
    compute = data.get("bnb_4bit_compute_dtype")
    return KbitConfig(
        bits=4 if four else 8,
        format=data.get("bnb_4bit_quant_type", "fp4") if four else None,
        double_quant=bool(data.get("bnb_4bit_use_double_quant", False)) if four else True,
        outlier_threshold=6.0 if four else float(data.get("llm_int8_threshold", 6.0)),  # 4 bits know no outliers
        compute_dtype=compute if four and compute not in (None, "float32") else None,
        skip_modules=list(skip) if skip is not None else None,
    )
