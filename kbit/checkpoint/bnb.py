"""The checkpoint layout of bitsandbytes 0.50: its keys and bytes from our codes and scales, and back.

4-bit, for a module M: `M.weight` uint8 `[(n + 1) // 2, 1]`, `M.weight.absmax` (fp32, or uint8 codes), `.quant_map`,
nested `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON in uint8.
8-bit: `M.weight` int8 `[N, K]`, `M.SCB` fp32 `[N]`, `M.weight_format` uint8 0. The codes are those of the native layout:
converting is a reshape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kbit.config import KbitConfig, parse_dtype
from kbit.formats.codebooks import codebook
from kbit.formats.packing import layout_shapes
from kbit.formats.spec import NESTED_BLOCK_SIZE, Format
from kbit.formats.tensor import QuantizedTensor

_STATE = "weight.quant_state.bitsandbytes__"
_CPU = torch.device("cpu")


def check_config(config: KbitConfig) -> None:
    """ValueError for what bitsandbytes cannot load."""
    if config.quantize_embeddings:
        raise ValueError("the bitsandbytes layout has no quantized embeddings; use the native layout")
    if config.weight_format.is_4bit and config.block_size not in (64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"bitsandbytes does not load block size {config.block_size} everywhere; use 64 or more")


def config_dict(config: KbitConfig, skipped: list[str]) -> dict[str, Any]:
    """What stands in config.json under `quantization_config`. skipped: names of linear layers that are not quantized."""
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


def to_tensors(q: QuantizedTensor, module: str) -> dict[str, Tensor]:
    """The tensors, by key, that bitsandbytes stores for the weight `q [N, K]` of `module`."""
    fmt = q.format
    if fmt.name == "int8":
        return {
            f"{module}.weight": q.codes,
            f"{module}.SCB": q.absmax,
            f"{module}.weight_format": torch.zeros((), dtype=torch.uint8),
        }
    if not fmt.is_4bit:
        raise ValueError(f"bitsandbytes has no checkpoint layout for {fmt.label}")
    state: dict[str, Any] = {
        "quant_type": fmt.name,
        "blocksize": fmt.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {
        f"{module}.weight": q.codes.reshape(-1, 1),
        f"{module}.weight.absmax": q.absmax.reshape(-1),
        f"{module}.weight.quant_map": codebook(fmt.name, _CPU).clone(),
    }
    if q.nested_absmax is not None and q.nested_offset is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(q.nested_offset),
        }
        tensors[f"{module}.weight.nested_absmax"] = q.nested_absmax
        tensors[f"{module}.weight.nested_quant_map"] = codebook("dynamic8", _CPU).clone()
    blob = json.dumps(state).encode()
    tensors[f"{module}.{_STATE}{fmt.name}"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8).clone()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], module: str, dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    """The weight of `module` from the tensors of a bitsandbytes checkpoint, whatever version wrote it.

    tensors: by full key. dtype: what an 8-bit weight decodes to; 4-bit ones say it themselves.

    Raises ValueError, with the key, for a missing tensor, a layout of old versions, another codebook or a size that
    does not fit.
    """
    for name in ("nf4", "fp4"):
        key = f"{module}.{_STATE}{name}"
        if key in tensors:
            return _read_4bit(tensors, module, name, key)
    codes, scales = _get(tensors, f"{module}.weight"), _get(tensors, f"{module}.SCB")
    layout = tensors.get(f"{module}.weight_format")
    if layout is not None and int(layout) != 0:
        names = {1: "col32", 2: "col_turing", 3: "col_ampere"}
        found = names.get(int(layout), int(layout))
        raise ValueError(f"{module}.weight_format is {found}, a layout of old versions; save it again with bitsandbytes 0.45")
    if codes.dtype != torch.int8 or codes.dim() != 2 or scales.numel() != codes.shape[0]:
        raise ValueError(f"{module}.weight is {codes.dtype} {list(codes.shape)} with {scales.numel()} scales, not int8 [N, K]")
    return QuantizedTensor(codes, scales.reshape(-1).float(), codes.shape, dtype, Format("int8", 0))


def _read_4bit(tensors: Mapping[str, Tensor], module: str, name: str, key: str) -> QuantizedTensor:
    try:
        state = json.loads(bytes(tensors[key].cpu().numpy()).decode())
        shape = torch.Size(int(size) for size in state["shape"])
        block_size = int(state["blocksize"])
        dtype = parse_dtype(state["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{key} is not a quantization state ({type(error).__name__}: {error})") from None
    assert dtype is not None
    nested = f"{module}.weight.nested_absmax" in tensors
    fmt = Format(name, block_size, nested)
    _check_table(tensors, f"{module}.weight.quant_map", codebook(name, _CPU))

    # With bnb_4bit_quant_storage=bfloat16 and the like, the same bytes under another dtype.
    packed = _get(tensors, f"{module}.weight").contiguous().reshape(-1).view(torch.uint8)
    absmax = _get(tensors, f"{module}.weight.absmax").reshape(-1)
    expected = ((math.prod(shape) + 1) // 2, fmt.block_count(shape))
    if (packed.numel(), absmax.numel()) != expected:
        raise ValueError(
            f"{module}.weight has {packed.numel()} bytes and {absmax.numel()} scales; {list(shape)} in blocks of "
            f"{block_size} has {expected[0]} and {expected[1]}"
        )
    codes_shape, scales_shape = layout_shapes(fmt, shape)
    nested_absmax = nested_offset = None
    if nested:
        if int(state.get("nested_blocksize", NESTED_BLOCK_SIZE)) != NESTED_BLOCK_SIZE:
            raise ValueError(f"{key} has nested blocks of {state['nested_blocksize']}; kbit reads {NESTED_BLOCK_SIZE}")
        _check_table(tensors, f"{module}.weight.nested_quant_map", codebook("dynamic8", _CPU))
        nested_absmax = _get(tensors, f"{module}.weight.nested_absmax").reshape(-1).float()
        # A JSON number; other tools store a tensor of their own, in the dtype that they compute in.
        offset = tensors.get(f"{module}.weight.nested_offset", state.get("nested_offset"))
        if offset is None:
            raise ValueError(f"{key} lacks nested_offset")
        nested_offset = torch.tensor([float(offset)], dtype=torch.float32, device=absmax.device)
    else:
        absmax = absmax.float()
    return QuantizedTensor(
        packed.view(codes_shape), absmax.view(scales_shape), shape, dtype, fmt, nested_absmax, nested_offset
    )


def _get(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"the checkpoint lacks {key}")
    return tensors[key]


def _check_table(tensors: Mapping[str, Tensor], key: str, table: Tensor) -> None:
    found = tensors.get(key)
    if found is not None and not torch.equal(found.cpu().float().reshape(-1), table.float().reshape(-1)):
        raise ValueError(f"{key} is not the codebook that kbit decodes with")
