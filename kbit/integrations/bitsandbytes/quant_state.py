"""`QuantState`: what bitsandbytes keeps beside the packed codes of a tensor, and how kbit's operators read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kbit.checkpoint import bnb
from kbit.formats.codebooks import codebook
from kbit.integrations.bitsandbytes.identity import lives_in


def pack_dict_to_tensor(source_dict: Mapping[str, Any]) -> Tensor:
    """A JSON-safe dictionary as a uint8 tensor: the metadata of a 4-bit weight in a state dict."""
    return bnb.pack_json(source_dict)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """The inverse of `pack_dict_to_tensor`. ValueError for bytes that are not one JSON object."""
    return bnb.unpack_json(tensor_data)


@lives_in("bitsandbytes.functional")
class QuantState:
    """The state of a 4-bit or blockwise 8-bit tensor.

    absmax: block scales, fp32 `[B]`; uint8 codes of them when nested. shape, dtype: of what was quantized.
    code: the codebook, fp32. blocksize: elements a block. quant_type: "nf4", "fp4", or None for blockwise 8-bit.
    offset, state2: fp32 mean and QuantState of the nested block scales; None unless nested.
    """

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = [f"bitsandbytes__{name}" for name in valid_quant_types]
    valid_qs_keys = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __getattr__(self, name: str) -> Any:
        # FSDP walks "weight.quant_state.bitsandbytes__nf4" attribute by attribute.
        if name.startswith("bitsandbytes__"):
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: int) -> Any:
        """The fields in the order of the list that very old versions used."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str | int | None) -> QuantState:
        """From the entries that `as_dict` makes, packed or not, with or without a prefix before their names.

        Raises ValueError that names the entry for missing, unknown or damaged ones. `qs_dict` is left as it is.
        """
        entries = {_entry(key): value for key, value in qs_dict.items()}
        if not any(key.startswith(bnb.BLOB_PREFIX) for key in entries) and "quant_type" not in entries:
            raise ValueError("expected packed or unpacked quant_state items, found neither")
        where = next((key for key in qs_dict if bnb.BLOB_PREFIX in key), "quant_state")
        values = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
        tensors = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
        for blob in [key for key in tensors if key.startswith(bnb.BLOB_PREFIX)]:
            values |= bnb.unpack_json(tensors.pop(blob), where)
            if blob != f"{bnb.BLOB_PREFIX}{values.get('quant_type')}":
                raise ValueError(f"{where} says that the weight is {values.get('quant_type')}: it is damaged")
        if "nested_offset" in tensors:
            values["nested_offset"] = tensors.pop("nested_offset")
        meta = bnb.check_fields(values, where)
        nested = meta.offset is not None
        wanted = {"absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if nested else set())
        if set(tensors) != wanted:
            missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
            raise ValueError(f"{where}: missing {missing or 'nothing'}, not understood {extra or 'nothing'}")
        offset = state2 = None
        if nested:
            # fp32 whatever the default dtype is: a bf16 offset shifts every block scale.
            offset = torch.tensor(meta.offset, dtype=torch.float32, device=device)
            state2 = cls(
                absmax=tensors["nested_absmax"].to(device, torch.float32),
                blocksize=bnb.NESTED_BLOCK_SIZE,
                code=tensors["nested_quant_map"].to(device, torch.float32),
                dtype=torch.float32,
            )
            state2.has_own_code()  # asked once, here: comparing tables waits for the device
        absmax = tensors["absmax"]
        return cls(
            absmax=absmax.to(device) if nested else absmax.to(device, torch.float32),
            shape=torch.Size(meta.shape),
            code=tensors["quant_map"].to(device, torch.float32),
            blocksize=meta.block_size,
            quant_type=meta.quant_type,
            dtype=meta.dtype,
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The fields under their checkpoint names; `packed` puts what is not a tensor into one uint8 tensor of JSON."""
        values: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": tuple(self.shape) if self.shape is not None else None,
        }
        if self.state2 is not None and self.offset is not None:
            assert self.state2.code is not None
            values |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                # A copy: safetensors refuses tensors of two layers that share storage.
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return values
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        return {**tensors, bnb.BLOB_PREFIX + self.quant_type: pack_dict_to_tensor(rest)}

    def to(self, device: torch.device | str | int | None) -> None:
        """Move every tensor, in place."""
        self.__dict__.update(self.moved(device).__dict__)

    def moved(self, device: torch.device | str | int | None, non_blocking: bool = False) -> QuantState:
        """The same state on another device; this one stays where it is."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        for name in ("absmax", "code", "offset"):
            value = getattr(self, name)
            if value is not None:
                setattr(new, name, value.to(device, non_blocking=non_blocking))
        if self.state2 is not None:
            new.state2 = self.state2.moved(device, non_blocking)
        return new

    def scales(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """absmax, nested absmax and nested offset as kbit's operators take them."""
        if self.state2 is None or self.offset is None:
            return self.absmax, None, None
        if self.state2.has_own_code():
            return self.decoded_absmax(), None, None
        return self.absmax, self.state2.absmax, self.offset.reshape(1)

    def decoded_absmax(self) -> Tensor:
        """fp32 block scales `[B]`, decoded where they are nested."""
        if self.state2 is None or self.offset is None:
            return self.absmax
        if self.state2.has_own_code():
            from kbit.integrations.bitsandbytes.blockwise import dequantize_blockwise

            return dequantize_blockwise(self.absmax, self.state2).float() + self.offset
        return torch.ops.kbit.dequantize_absmax(self.absmax, self.state2.absmax, self.offset.reshape(1))

    def has_own_code(self) -> bool:
        """Whether the codes of this 8-bit state mean something else than in the signed dynamic map, to the last bit."""
        if "_own_code" not in self.__dict__:
            code = self.code
            standard = code is None or code.is_meta or torch.equal(code.float(), codebook("dynamic8", code.device))
            self._own_code = not (standard and self.blocksize == bnb.NESTED_BLOCK_SIZE)
        return self._own_code

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        return (
            _close(self.absmax, other.absmax)
            and _close(self.code, other.code)
            and _close(self.offset, other.offset)
            and (self.shape, self.dtype, self.blocksize) == (other.shape, other.dtype, other.blocksize)
            and self.quant_type == other.quant_type
            and self.state2 == other.state2
        )

    __hash__ = None  # type: ignore[assignment]


def _entry(key: str) -> str:
    """The name of a state entry without what stands before it: "a.weight.absmax" -> "absmax"."""
    head, found, tail = key.rpartition(bnb.BLOB_PREFIX)
    return found + tail if found else key.rpartition(".")[2]


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)
