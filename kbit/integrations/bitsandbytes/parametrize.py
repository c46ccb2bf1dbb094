"""bitsandbytes.nn.parametrize: 4-bit Parameters of any module, such as fused experts, decoded when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from kbit.integrations.bitsandbytes.blockwise import dequantize_4bit, quantize_4bit
from kbit.integrations.bitsandbytes.identity import lives_in
from kbit.integrations.bitsandbytes.quant_state import QuantState
from kbit.ops.quantize import check_quantizable


@lives_in("bitsandbytes.nn.parametrize")
class Bnb4bitParametrization(nn.Module):
    """Decodes packed 4-bit codes to the shape and dtype of what was quantized."""

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """The state follows the codes to another device; `fn` never sees its dtypes."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.quant_state.absmax.device)).device
        if device.type != "meta":
            self.quant_state.to(device)
        return self

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        return dequantize_4bit(quantized_param, self.quant_state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r}")
    value = getattr(module, name)
    if not isinstance(value, nn.Parameter):
        raise TypeError(f"{type(module).__name__}.{name} is a {type(value).__name__}, not a Parameter")
    return value


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize one Parameter of a module, of any shape, in place; reading it decodes it.

    The state dict keeps the key `param_name` for the codes, with the state beside it, as for a 4-bit linear layer, and
    loads into a module that was prepared in the same way. Raises AttributeError or TypeError where there is no such
    Parameter, ValueError for NaN and infinity.
    """
    value = _parameter(module, param_name)
    check_quantizable(value.detach(), f"parameter {param_name!r}")
    codes, state = quantize_4bit(
        value.detach(), blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    setattr(module, param_name, nn.Parameter(codes, requires_grad=False))
    _attach(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device | str
) -> None:
    """Read the codes that a Parameter holds already with the state in `qs_dict`. Errors as `replace_parameter_4bit`."""
    _parameter(module, param_name)
    _attach(module, param_name, QuantState.from_dict(qs_dict, device=device))


def _attach(module: nn.Module, name: str, state: QuantState) -> None:
    P.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)

    def save(owner: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        key = f"{prefix}parametrizations.{name}.original"
        if key not in state_dict:
            return
        state_dict[f"{prefix}{name}"] = state_dict.pop(key)
        current = owner.parametrizations[name][0].quant_state  # type: ignore[index, union-attr]
        state_dict |= {f"{prefix}{name}.{part}": value for part, value in current.as_dict(packed=True).items()}

    def load(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes = state_dict.pop(f"{prefix}{name}", None)
        parts = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{prefix}{name}.")}
        if codes is None or not parts:
            return  # torch reports the missing key
        parametrization: Any = owner.parametrizations[name][0]  # type: ignore[index]
        original: Tensor = owner.parametrizations[name].original  # type: ignore[index, assignment, union-attr]
        parametrization.quant_state = QuantState.from_dict(parts, device=original.device)
        state_dict[f"{prefix}parametrizations.{name}.original"] = codes

    # Decode once a forward call, however often the module reads the parameter. `always_call`: gradient checkpointing
    # stops its second forward with an exception, and the cache must be given up then too.
    def enter(owner: nn.Module, inputs: Any) -> None:
        P._cache_enabled += 1

    def leave(owner: nn.Module, inputs: Any, output: Any) -> None:
        P._cache_enabled = max(0, P._cache_enabled - 1)
        if not P._cache_enabled:
            P._cache = {}

    module.register_state_dict_post_hook(save)
    module.register_load_state_dict_pre_hook(load)
    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
