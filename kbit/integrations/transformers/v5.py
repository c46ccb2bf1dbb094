"""Loading under transformers 5: a conversion operation turns each weight into its quantized parts."""

from __future__ import annotations

import os
import weakref
from collections.abc import ItemsView
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from kbit.integrations.transformers import keys, moe, ties
from kbit.integrations.transformers.quantizer import KbitQuantizer

_ASYNC_SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"


class QuantizedParts(dict[str, Any]):
    """Weights by key that are quantized when their items are asked for, which transformers does once.

    It does so outside of the handler that turns errors of a conversion into a line of its loading report: a NaN in a
    weight reaches the user as the ValueError that it is, at once.
    """

    def __init__(self, weights: dict[str, Any], quantizer: KbitQuantizerV5) -> None:
        super().__init__(weights)
        self.quantizer = quantizer

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        try:
            return self._quantized()
        except BaseException:
            self.quantizer.stop_loading_one_by_one()  # the load ends here
            raise

    def _quantized(self) -> ItemsView[str, Any]:
        parts: dict[str, Any] = {}
        for key in list(self):
            weight = self.pop(key)  # no second reference: the floating point weight is freed as soon as it is done
            if keys.split(key, self.quantizer.modules) is None:
                parts[key] = weight
                continue
            weight = weight[0] if isinstance(weight, list) else weight
            parts.update(self.quantizer.quantize(key, weight))
            nbytes = weight.nbytes
            del weight
            self.quantizer.trimmer.freed(nbytes)
        return parts.items()


class KbitQuantize(ConversionOps):
    """The operation that transformers runs on a weight of which `param_needs_quantization` is true."""

    def __init__(self, hf_quantizer: KbitQuantizerV5) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return QuantizedParts(input_dict, self.hf_quantizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> KbitQuantize:
        return self  # converters are copied for every tensor; the quantizer and its modules are not


class KbitQuantizerV5(KbitQuantizer):
    """`KbitQuantizer` for transformers 5."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        ties.tie_before_loading(model)
        super()._process_model_before_weight_loading(model, **kwargs)
        if not self.pre_quantized:
            self._expect_floating_point()
            self._load_one_by_one()
        return model

    def _take_foreign(self, model: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
        # Everything else is loaded by now, and what was missing lies on its device, without values.
        empty = set(missing)
        missing, unexpected = super()._take_foreign(model, missing, unexpected)
        assert self.foreign is not None
        for name, module in self.modules.items():
            if self.foreign.has(name):
                self.foreign.refuse_offloaded(name, module.weight)
                codes = None if f"{name}.weight" in empty else module.weight.detach()
                module.set_parts(self.foreign.parts(name, module, module.weight.device, codes))
        for name in self.foreign.floats:
            module = model.get_submodule(name.rpartition(".")[0])
            self.foreign.refuse_offloaded(name, module.weight)
            module.weight = self.foreign.dequantized(name, module.weight.device, torch.empty(0, dtype=model.dtype))
        return missing, unexpected

    def _expect_floating_point(self) -> None:
        # Early releases of version 5 cast a tensor to the dtype of the Parameter it is loaded into before they
        # quantize it: until then the weights are the floating point ones, on the meta device.
        for module in self.modules.values():
            shape = tuple(module.weight_shape)
            weight = torch.empty(shape, dtype=module.weight_dtype, device="meta")
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            module._parameters["weight"]._is_hf_initialized = True  # type: ignore[union-attr]

    def _load_one_by_one(self) -> None:
        """Have tensors read when their turn comes; a pool that reads ahead would hold them all in floating point.

        Newer releases do that whenever they quantize. The variable is put back after loading, or with this object
        where loading fails.
        """
        _SyncLoads.begin()
        self._restore_switch = weakref.finalize(self, _SyncLoads.end)  # runs once: when called, or with this object

    def stop_loading_one_by_one(self) -> None:
        """Put the variable back. Safe to call again."""
        restore = getattr(self, "_restore_switch", None)
        if restore is not None:
            restore()

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element, so that device maps are computed from what a weight will take."""
        place = keys.split(param_name, self.modules)
        if place is None or place[1] != "weight":
            return float(param.element_size())
        module = self.modules[place[0]]
        shape, dtype = keys.expected_part(module, "weight")
        return torch.empty(shape, dtype=dtype, device="meta").nbytes / max(param.numel(), 1)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Fused experts are quantized under another key than that of the Parameter they replace."""
        adapted = moe.adapt_conversions(weight_conversions, self.modules, self.pre_quantized)
        inherited: list[Any] = super().update_weight_conversions(adapted, model)
        return inherited

    def get_quantize_ops(self) -> KbitQuantize:
        return KbitQuantize(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """No cast for the parts of quantized weights: a wrong dtype in the checkpoint is an error, found later."""
        targets = getattr(converter, "target_patterns", None) or [""]
        if self.foreign is not None and not self.foreign.floats.isdisjoint(targets):
            return None
        if any(keys.split(target, self.modules) is not None for target in targets):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.stop_loading_one_by_one()
        return super()._process_model_after_weight_loading(model, **kwargs)


class _SyncLoads:
    """How many loads need the switch, and what it was before the first of them."""

    active = 0
    before: str | None = None

    @classmethod
    def begin(cls) -> None:
        if cls.active == 0:
            cls.before = os.environ.get(_ASYNC_SWITCH)
            os.environ[_ASYNC_SWITCH] = "1"
        cls.active += 1

    @classmethod
    def end(cls) -> None:
        cls.active -= 1
        if cls.active == 0:
            if cls.before is None:
                os.environ.pop(_ASYNC_SWITCH, None)
            else:
                os.environ[_ASYNC_SWITCH] = cls.before
