"""Loading under transformers 4.57: each tensor of a quantized module is handed over as it is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kbit.integrations.transformers import keys, ties
from kbit.integrations.transformers.quantizer import KbitQuantizer


class KbitQuantizerV4(KbitQuantizer):
    """`KbitQuantizer` for transformers 4.57."""

    requires_parameters_quantization = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("from_tf") or kwargs.get("from_flax"):
            raise ValueError("kbit quantizes PyTorch checkpoints; convert the TensorFlow or Flax weights first")
        from transformers.utils import is_accelerate_available

        if not is_accelerate_available():
            raise ImportError("transformers 4 needs accelerate to load quantized models: pip install accelerate")

    def get_accelerator_warm_up_factor(self) -> int:
        return 2  # the meta model has the true sizes already

    def note_dtype(self, config: Any, dtype: torch.dtype) -> None:
        config._pre_quantization_dtype = dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # A module counts as initialized when all its Parameters and buffers do, but nothing marks buffers that are not
        # saved; such a module (GPT-2's attention) would draw random numbers for its layers, into codes.
        for buffer in model.buffers():
            buffer._is_hf_initialized = True
        return super()._process_model_before_weight_loading(model, **kwargs)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Scales that do not exist yet are not missing from a checkpoint that is quantized while it loads."""
        if self.pre_quantized:
            self.missing = {key for key in missing_keys if keys.split(key, self.modules)}
            return [key for key in missing_keys if key not in self.missing]
        self.missing = {key for key in missing_keys if keys.split(key, self.modules) and not self._is_scale(key)}
        return [key for key in missing_keys if not self._is_scale(key)]

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Place one tensor of the checkpoint: quantize a weight, or take a stored part as it is."""
        if param_name in self.missing:
            return  # a placeholder of transformers for a layer that the checkpoint does not have
        name, part = param_name.rsplit(".", 1)
        if self.foreign is not None and param_name in self.foreign.floats:
            module = model.get_submodule(name)
            module.weight = self.foreign.dequantized(param_name, target_device, module.weight)
            module.weight._is_hf_initialized = True
            return
        if self.foreign is not None and self.foreign.has(name):
            if part != "weight":
                return  # it was read with the codes
            parts = self.foreign.parts(name, self.modules[name], target_device, param_value[...].to(target_device))
        elif self.pre_quantized:
            parts = {part: keys.fit(param_name, param_value[...], self.modules[name], part).to(target_device)}
        else:
            self.trimmer.freed(param_value.nbytes)  # the caller let go of the one before when it read this one
            quantized = self.quantize(param_name, param_value[...].to(target_device))
            self.trimmer.freed(param_value.nbytes)
            parts = {key.rpartition(".")[2]: tensor for key, tensor in quantized.items()}
        for key, tensor in parts.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            self.modules[name]._parameters[key] = parameter
            ties.share(model, self.groups, name, key)
