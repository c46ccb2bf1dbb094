"""`Params4bit` and `Int8Params`: the Parameters that quantize themselves when they are moved to a device.

This is the state machine of bitsandbytes, which its users and the Hugging Face libraries rely on; native kbit modules
have nothing of it. What differs on purpose: a move copies the state instead of changing the one it came from, quantized
bytes are never cast, and a copy or a pickle comes back as what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kbit.checkpoint import bnb
from kbit.integrations.bitsandbytes.blockwise import quantize_4bit
from kbit.integrations.bitsandbytes.codes import default_device
from kbit.integrations.bitsandbytes.identity import lives_in
from kbit.integrations.bitsandbytes.matmul import fp16_for_codes
from kbit.integrations.bitsandbytes.quant_state import QuantState
from kbit.ops.quantize import check_quantizable

_raw_data = torch.Tensor.data  # type: ignore[attr-defined]


def _parse_to(args: Any, kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, bool]:
    if args and type(args[0]) is int and not torch.accelerator.is_available():
        args = ("cpu", *args[1:])  # accelerate quantizes on device 0 whatever there is
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype, non_blocking


class _MovedByName(nn.Parameter):
    """`.cpu()`, `.cuda()` and `.xpu()` are moves like any other; casts leave quantized bytes alone."""

    def _is_quantized(self) -> bool:
        raise NotImplementedError

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Any:
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device: Any = None, non_blocking: bool = False) -> Any:
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)


def _cast(name: str) -> Callable[[Any], Any]:
    dtype = {"half": torch.float16, "float": torch.float32, "bfloat16": torch.bfloat16, "double": torch.float64}[name]

    def cast(self: Any) -> Any:
        return self if self._is_quantized() else self.to(dtype)

    cast.__name__ = name
    return cast


for _name in ("half", "float", "bfloat16", "double"):
    setattr(_MovedByName, _name, _cast(_name))


@lives_in("bitsandbytes.nn.modules")
class Params4bit(_MovedByName):
    """A weight that is quantized to 4 bits by its first move to a device (`.to`, `.cuda`, `.cpu`).

    data: the weight, or its packed codes when bnb_quantized. quant_state: set by quantizing. blocksize, quant_type
    ("nf4", "fp4"), compress_statistics (double quantization), quant_storage (dtype that holds the codes): how.
    module: whose `quant_state` follows this one's. Unknown keywords are accepted and ignored, because other libraries
    pass a parameter's `__dict__` back in.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: nn.Module | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        if quant_type not in ("nf4", "fp4"):
            raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int | None = None,
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """From packed codes and the entries beside them in a checkpoint, on `device` (the GPU if there is one).

        Raises ValueError where codes and entries do not belong together.
        """
        device = default_device() if device is None else device
        state = QuantState.from_dict(quantized_stats, device=device)
        _check_belongs(data, state)
        self = cls(
            data.detach().to(device),
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "nf4",
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )
        self._share_state()
        return self

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return _raw_data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        """`parameter.data = moved`, which nn.Module.to does, takes over the state of what was moved."""
        _raw_data.__set__(self, value)
        if isinstance(value, Params4bit) and value is not self and value.bnb_quantized:
            self.quant_state = value.quant_state
            self.quant_storage, self.bnb_quantized = value.quant_storage, True
            self._share_state()

    def _is_quantized(self) -> bool:
        return self.bnb_quantized

    def _share_state(self) -> None:
        if self.module is not None:
            self.module.quant_state = self.quant_state  # type: ignore[assignment]

    def _quantize(self, device: torch.device | str | int) -> Params4bit:
        weight = _raw_data.__get__(self).to(device)
        check_quantizable(weight, "this 4-bit weight")
        packed, self.quant_state = quantize_4bit(
            weight,
            blocksize=self.blocksize,
            compress_statistics=bool(self.compress_statistics),
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        _raw_data.__set__(self, packed)
        self.bnb_quantized = True
        self._share_state()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        """Quantize on the first move to a real device; afterwards move codes and state. Codes are never cast."""
        device, dtype, non_blocking = _parse_to(args, kwargs)
        if not self.bnb_quantized:
            if device is not None and device.type != "meta":
                return self._quantize(device)
            moved = super().to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self._like(moved, self.quant_state, self.module)
        if device is None or device == self.device:
            return self
        state = None if self.quant_state is None else self.quant_state.moved(device, non_blocking)
        return self._like(super().to(device=device, non_blocking=non_blocking), state, self.module)

    def _like(self, data: Tensor, state: QuantState | None, module: nn.Module | None) -> Params4bit:
        return type(self)(
            data,
            requires_grad=self.requires_grad,
            quant_state=state,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
            module=module,
            bnb_quantized=self.bnb_quantized,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        # The module is copied only as a part of its own copy; a parameter alone keeps pointing at the one it has.
        module = memo.get(id(self.module), self.module)
        data = _raw_data.__get__(self).clone(memory_format=torch.preserve_format)
        new = self._like(data, copy.deepcopy(self.quant_state, memo), module)
        memo[id(self)] = new
        return new

    def __copy__(self) -> Params4bit:
        return self._like(_raw_data.__get__(self), self.quant_state, self.module)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {**self.__dict__, "data": _raw_data.__get__(self), "requires_grad": self.requires_grad}
        return type(self), (_raw_data.__get__(self), self.requires_grad), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        _raw_data.__set__(self, state.pop("data"))
        self.requires_grad = state.pop("requires_grad")
        self.__dict__.update(state)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        result = super().__torch_function__(func, types, args, kwargs or {})
        # FSDP cuts parameters with these, and expects pieces of the same class.
        if func in (torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split):
            whole = args[0]
            pieces = tuple(whole._like(piece, whole.quant_state, whole.module) for piece in result)
            return pieces if isinstance(result, (tuple, list)) else pieces[0]
        return result


def _state_property(name: str, read: Callable[[QuantState], Any]) -> property:
    """FSDP walks state dict keys such as "weight.nested_absmax" by getattr, so each has to be an attribute."""

    def get(self: Params4bit) -> Any:
        state = self.__dict__.get("quant_state")
        value = None if state is None else read(state)
        if value is None and (state is None or name.startswith("nested")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return value

    return property(get)


for _name, _read in {
    "absmax": lambda state: state.absmax,
    "code": lambda state: state.code,
    "quant_map": lambda state: state.code,
    "offset": lambda state: state.offset,
    "state2": lambda state: state.state2,
    "nested_absmax": lambda state: state.state2 and state.state2.absmax,
    "nested_blocksize": lambda state: state.state2 and state.state2.blocksize,
    "nested_quant_map": lambda state: state.state2 and state.state2.code,
    "nested_dtype": lambda state: state.state2 and state.state2.dtype,
    "nested_offset": lambda state: state.offset,
}.items():
    setattr(Params4bit, _name, _state_property(_name, _read))


def _check_belongs(data: Tensor, state: QuantState) -> None:
    """ValueError unless the packed codes and every part of the state have the sizes that the metadata says."""
    assert state.shape is not None and state.dtype is not None and state.code is not None
    offset = None if state.offset is None or state.offset.is_meta else float(state.offset)
    if state.nested and offset is None:
        offset = 0.0
    meta = bnb.Metadata(state.quant_type or "", state.blocksize or 0, state.dtype, tuple(state.shape), offset)
    parts = {"weight": data, "absmax": state.absmax, "quant_map": state.code}
    if state.state2 is not None and state.state2.code is not None:
        parts |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
    bnb.check_parts("this 4-bit weight", meta, parts)


@lives_in("bitsandbytes.nn.modules")
class Int8Params(_MovedByName):
    """A weight `[N, K]` that is quantized to int8 by its first move to a device, unless has_fp16_weights.

    data: the weight, or its int8 codes. CB: the codes once they exist (the same storage as the data). SCB: fp32 row
    absmax `[N]`. Unknown keywords are accepted and ignored.
    """

    CB: Tensor | None
    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data, requires_grad and data.is_floating_point())
        self.has_fp16_weights = has_fp16_weights
        self.CB = CB
        self.SCB = SCB
        return self

    def _is_quantized(self) -> bool:
        return self.dtype == torch.int8

    def _quantize(self, device: torch.device | str | int) -> Int8Params:
        weight = self.data.to(device)
        check_quantizable(weight, "this int8 weight")
        codes, scales = torch.ops.kbit.quantize_int8(fp16_for_codes(weight))
        self.requires_grad = False
        self.data = codes
        self.CB, self.SCB = codes, scales
        return self

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:  # type: ignore[override]
        """Quantize on the first move to a real device; afterwards move codes and scales. Codes are never cast."""
        device, dtype, non_blocking = _parse_to(args, kwargs)
        if not self._is_quantized():
            if device is not None and device.type != "meta" and not self.has_fp16_weights and not self.is_meta:
                return self._quantize(device)
            moved = super().to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self._like(moved, None, None)
        new = self._like(super().to(device=device, non_blocking=non_blocking), None, self.SCB)
        new.CB = new.data
        if device is not None and self.SCB is not None and self.SCB.device.type != "meta":
            new.SCB = self.SCB.to(device, non_blocking=non_blocking)
        return new

    def _like(self, data: Tensor, CB: Tensor | None, SCB: Tensor | None) -> Int8Params:
        return type(self)(data, self.requires_grad, self.has_fp16_weights, CB, SCB)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        data = self.data.clone(memory_format=torch.preserve_format)
        codes = data if self.CB is not None and self.dtype == torch.int8 else copy.deepcopy(self.CB, memo)
        new = self._like(data, codes, copy.deepcopy(self.SCB, memo))
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.data, self.requires_grad, self.has_fp16_weights, self.CB, self.SCB)


def apply_across_meta(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Apply a move from or to the meta device to the weight of `module`: nn.Module would lose the Parameter's class."""
    weight = module._parameters["weight"]
    if not isinstance(weight, (Params4bit, Int8Params)):
        return
    probe = fn(torch.empty(0, dtype=torch.uint8, device=weight.device))
    if not isinstance(probe, Tensor) or probe.is_meta == weight.is_meta:
        return
    new = fn(weight)
    if isinstance(weight, Params4bit) and not isinstance(new, Params4bit):  # to_empty
        new = weight._like(new, weight.quant_state, weight.module)
    elif isinstance(weight, Int8Params) and not isinstance(new, Int8Params):
        new = weight._like(new, None, weight.SCB)
    module._parameters["weight"] = new
    if isinstance(new, Params4bit):
        new._share_state()
