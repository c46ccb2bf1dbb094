"""`Linear4bit`, `Linear8bitLt` and their kin: bitsandbytes' linear layers over kbit's operators."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from kbit.checkpoint import bnb
from kbit.integrations.bitsandbytes.identity import lives_in
from kbit.integrations.bitsandbytes.matmul import MatmulLtState, matmul, matmul_4bit
from kbit.integrations.bitsandbytes.params import Int8Params, Params4bit, apply_across_meta
from kbit.integrations.bitsandbytes.quant_state import QuantState
from kbit.integrations.bitsandbytes.sharded import is_sharded, load_sharded

logger = logging.getLogger(__name__)
_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning(text)


def weight_state(module: Any) -> QuantState:
    """The state of a module's 4-bit weight, found again at the module where FSDP replaced the parameter.

    RuntimeError for a weight that was never quantized.
    """
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        return state
    if module.quant_state is None:
        raise RuntimeError(
            f"this {type(module).__name__} is not quantized yet: move it to a device first, for example "
            'module.to("cpu") or module.to("cuda")'
        )
    if not isinstance(module.weight, Params4bit):
        module.weight = Params4bit(module.weight, quant_storage=module.quant_storage, bnb_quantized=True)
    module.weight.quant_state = module.quant_state
    return module.quant_state


@lives_in("bitsandbytes.nn.modules")
def fix_4bit_weight_quant_state_from_module(module: Any) -> None:
    """Give the weight of a 4-bit module its state back where FSDP dropped it."""
    weight_state(module)


def save_state(module: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    """Add the state of a quantized 4-bit weight to a state dict, under bitsandbytes' keys.

    FSDP2 puts a DTensor in the place of the parameter, which has lost it; the module still knows. What gathers sharded
    state dicts looks every key up as an attribute of the weight, so it gets these too.
    """
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None and module.quant_state is not None and not isinstance(weight, Params4bit):
        shape = module.quant_state.shape
        if weight.numel() * weight.element_size() == (math.prod(shape) + 1) // 2:  # its codes, not another weight
            state = module.quant_state
            for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
                setattr(weight, name, None)
            weight.quant_state = state
    if state is not None:
        for name, value in state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{name}"] = value if keep_vars else value.detach()


def load_state(module: Any, state_dict: Any, prefix: str, error_msgs: list[str]) -> set[str]:
    """Load a quantized 4-bit weight from a state dict; returns the keys beside the weight that were used.

    A packed weight without its state, or a damaged one, is an error even with strict=False: it would be garbage.
    """
    name = f"{prefix}weight"
    packed = state_dict.get(name)
    parts = {key[len(name) + 1 :]: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
    if packed is None:
        if parts:
            error_msgs.append(f"{name} is missing, but its quantization state is there: {', '.join(sorted(parts))}")
        return set()
    old = module.weight
    if is_sharded(old):
        try:
            load_sharded(module, name, packed, parts)
        except ValueError as error:
            error_msgs.append(str(error))
            return set()
        return {f"{name}.{part}" for part in parts}
    if not parts:
        codes = not packed.is_floating_point() or (packed.dim() == 2 and packed.shape[1] == 1 != old.shape[-1])
        if codes:
            error_msgs.append(f"{name} holds packed 4-bit codes without their state ({name}.absmax and so on)")
        elif getattr(old, "bnb_quantized", False):
            error_msgs.append(
                f"{name} is {packed.dtype} {list(packed.shape)}, but this layer is quantized already: load the state "
                "dict before moving the layer to a device"
            )
        return set()
    try:
        bnb.check_parts(name, bnb.read_metadata(name, parts), {**parts, "weight": packed})
        device = packed.device if old.is_meta else old.device
        new = Params4bit.from_prequantized(packed, parts, device=device, module=module)
    except ValueError as error:
        error_msgs.append(str(error))
        return set()
    assert new.quant_state is not None
    shape = tuple(new.quant_state.shape or ())
    if shape != module.weight_shape:
        error_msgs.append(f"{name} is a quantized {list(shape)}, but this layer needs {list(module.weight_shape)}")
        return set()
    module.weight = new
    return {f"{name}.{part}" for part in parts}


class Module4bit(nn.Module):
    """What Linear4bit and Embedding4bit share: their state dicts load into what wrote them."""

    quant_state: QuantState | None
    weight_shape: tuple[int, int]

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        apply_across_meta(self, fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_state(self, destination, prefix, keep_vars)

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        before = len(error_msgs)
        used = load_state(self, state_dict, prefix, error_msgs)
        if len(error_msgs) > before:
            return
        weight = self.weight  # a new one, or where it is sharded the old one, into which the codes are copied
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if used:
            self.weight = weight  # assign=True would have put a plain Parameter there
            unexpected_keys[:] = [key for key in unexpected_keys if key not in used]


@lives_in("bitsandbytes.nn.modules")
class Linear4bit(Module4bit, nn.Linear):
    """`y = x W^T + b` with W in 4 bits ("QLoRA", arXiv 2305.14314); W is quantized when the layer moves to a device.

    compute_dtype: dtype of the product; None computes in the input's dtype. compress_statistics: double quantization.
    quant_type: "nf4" or "fp4". quant_storage: dtype that holds the packed codes. The output has the input's dtype.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)  # type: ignore[arg-type]
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state = None
        self.quant_storage = quant_storage
        self.weight_shape = (output_features, input_features)

    def set_compute_type(self, x: Tensor) -> None:
        """Say once where a compute dtype of float32 slows 16-bit inputs down; the dtype is left as it was chosen."""
        if self.compute_dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
            name = str(x.dtype).removeprefix("torch.")
            _say_once(
                f"4-bit layers get {name} inputs but compute in float32, which is slower: pass "
                f"bnb_4bit_compute_dtype=torch.{name} (float32 is transformers' default)"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., K]`, floating point -> `[..., N]` in x's dtype."""
        state = weight_state(self)
        if self.compute_dtype is None or self.compute_dtype == x.dtype:
            return matmul_4bit(x, self.weight, state, bias=self.bias)
        if not torch.compiler.is_compiling():
            self.set_compute_type(x)
        return matmul_4bit(x.to(self.compute_dtype), self.weight, state, bias=self.bias).to(x.dtype)


@lives_in("bitsandbytes.nn.modules")
class LinearFP4(Linear4bit):
    """Linear4bit with FP4."""

    def __init__(  # type: ignore[no-untyped-def]
        self,
        input_features,
        output_features,
        bias=True,
        compute_dtype=None,
        compress_statistics=True,
        quant_storage=torch.uint8,
        device=None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


@lives_in("bitsandbytes.nn.modules")
class LinearNF4(Linear4bit):
    """Linear4bit with NF4."""

    def __init__(  # type: ignore[no-untyped-def]
        self,
        input_features,
        output_features,
        bias=True,
        compute_dtype=None,
        compress_statistics=True,
        quant_storage=torch.uint8,
        device=None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


@lives_in("bitsandbytes.nn.modules")
class Linear8bitLt(nn.Linear):
    """LLM.int8() (arXiv 2208.07339): `y = x W^T + b` with row-wise int8 weights, on every device.

    has_fp16_weights: keep the weight in floating point, train it, and take its codes in every product; False
    quantizes it for good when the layer moves to a device. threshold: outlier columns of x with a magnitude of at
    least this are multiplied in x's dtype; 0 turns that off. The product has x's dtype.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)  # type: ignore[arg-type]
        self.state = MatmulLtState()
        self.index = index
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.weight = Int8Params(self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights)

    def init_8bit_state(self) -> None:
        """Hand the codes and scales of the weight over to the state."""
        self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB
        self.weight.CB = self.weight.SCB = None

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves take the state along, wherever it is kept at the moment; scales stay fp32."""
        apply_across_meta(self, fn)
        super()._apply(fn, recurse)
        weight = self.weight
        if not isinstance(weight, Int8Params):
            return self
        if weight.dtype == torch.int8 and not weight.is_meta:
            if weight.CB is not None:
                weight.CB = weight.data
            if weight.SCB is not None and not weight.SCB.is_meta:
                weight.SCB = weight.SCB.to(weight.device)
            if self.state.CB is not None:
                self.state.CB = weight.data
        elif weight.is_floating_point():
            self.state.reset_grads()  # codes of another device or dtype
        if not weight.is_meta:
            self.state.moved(weight.device)
        return self

    def _scales(self) -> Tensor | None:
        scales = getattr(self.weight, "SCB", None)
        return scales if scales is not None else self.state.SCB

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scales = self._scales()
        if scales is not None and not self.state.has_fp16_weights:
            destination[f"{prefix}SCB"] = scales if keep_vars else scales.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        weight, scales = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}SCB")
        problem = self._check_loadable(state_dict, prefix, weight, scales)
        if problem:
            error_msgs.append(problem)
            return
        quantized = weight is not None and weight.dtype == torch.int8
        if quantized:
            old = self.weight
            device = weight.device if old.is_meta else old.device
            codes = weight.detach().to(device, copy=not old.is_meta)
            new = Int8Params(codes, requires_grad=False, CB=codes, SCB=scales.detach().float().to(device, copy=True))
            self.weight = new
            self.state.reset_grads()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = (f"{prefix}SCB", f"{prefix}weight_format")
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]
        if quantized:
            self.weight = new  # assign=True would have put a plain Parameter there

    def _check_loadable(self, state_dict: Any, prefix: str, weight: Tensor | None, scales: Tensor | None) -> str | None:
        name = f"{prefix}weight"
        if is_sharded(self.weight) and self.weight.dtype == torch.int8:
            return f"{name}: int8 layers cannot load once they are sharded; load the state dict before fully_shard"
        if weight is None:
            return f"{prefix}SCB is there without {name}" if scales is not None else None
        if weight.dtype != torch.int8:
            if self.weight.dtype == torch.int8:
                return (
                    f"{name} is {weight.dtype}, but this layer is quantized already: load the state dict before moving "
                    "the layer to a device"
                )
            return f"{prefix}SCB is there, but {name} is {weight.dtype}" if scales is not None else None
        if self.state.has_fp16_weights:
            return f"{name} is int8, but this layer has has_fp16_weights=True, which trains a floating point weight"
        parts = {"weight": weight}
        parts |= {p: state_dict[f"{prefix}{p}"] for p in ("SCB", "weight_format") if f"{prefix}{p}" in state_dict}
        if scales is None:
            return f"{prefix}SCB, the row scales of the int8 {name}, is missing"
        try:
            bnb.decode(name, parts)
        except ValueError as error:
            return str(error)
        if tuple(weight.shape) != (self.out_features, self.in_features):
            return f"{name} is {list(weight.shape)}, but this layer needs {[self.out_features, self.in_features]}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., K]`, floating point -> `[..., N]` in x's dtype."""
        self.state.is_training = self.training
        weight = self.weight
        if getattr(weight, "CB", None) is not None:
            self.init_8bit_state()
        elif weight.dtype == torch.int8 and self.state.CB is None:
            # The parameter was replaced (an offload hook, a loader): its codes are the data, its scales come with it.
            self.state.CB = weight.data
            if getattr(weight, "SCB", None) is not None:
                self.state.SCB = weight.SCB
        out = matmul(x, weight, bias=self.bias, state=self.state)
        if not self.state.has_fp16_weights and self.state.CB is not None and weight.dtype != torch.int8:
            weight.requires_grad_(False)
            weight.data = self.state.CB
        return out
