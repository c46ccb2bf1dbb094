"""kbit inside diffusers: a pipeline's transformer or U-Net is quantized while it loads, saved, and loaded again.

`PipelineQuantizationConfig(quant_mapping={"transformer": KbitConfig(bits=4), "text_encoder": KbitConfig(bits=8)})` or
`quant_backend="kbit"`; components that are transformers models go through `kbit.integrations.transformers`. diffusers
has no public registration, so `register` enters its two tables, as soon as `diffusers.quantizers.auto` is imported.
"""

from __future__ import annotations

import enum
import functools
import logging
import weakref
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from kbit.config import QUANT_METHOD
from kbit.config import KbitConfig as PlainConfig
from kbit.integrations.asked import check_stored, with_run_time
from kbit.integrations.transformers import keys, offload, ties
from kbit.integrations.transformers.heap import Trimmer, trim
from kbit.integrations.transformers.pieces import quantize_in_pieces
from kbit.nn import convert
from kbit.nn.base import QuantizedModule
from kbit.nn.select import select_experts

logger = logging.getLogger("kbit")


class Method(enum.StrEnum):
    """diffusers asks a quant_method for its `.value`."""

    KBIT = QUANT_METHOD


class KbitConfig(PlainConfig):
    """`kbit.KbitConfig` as a diffusers model keeps it. Users pass `kbit.KbitConfig`; this class is made from it."""

    quant_method = Method.KBIT  # type: ignore[assignment]

    @classmethod
    def from_plain(cls, config: PlainConfig) -> KbitConfig:
        """The same settings in this class."""
        return cls(**{name: value for name, value in config.to_dict().items() if name != "quant_method"})


def register() -> None:
    """Enter kbit's config and quantizer in the tables of the diffusers that is imported. Safe to call again."""
    from diffusers.quantizers import auto

    # The plain class: what users put into a quant_mapping is checked to be an instance of a registered one.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = PlainConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = KbitDiffusersQuantizer
    _wrap_merge(auto.DiffusersAutoQuantizer)
    for listeners, function in (
        (convert.on_quantized, attach_to_diffusers),
        (convert.on_dequantized, detach_from_diffusers),
    ):
        if function.__name__ not in [known.__name__ for known in listeners]:
            listeners.append(function)  # type: ignore[arg-type]


def _wrap_merge(quantizers: Any) -> None:
    """Have a KbitConfig that is passed beside a quantized checkpoint mean what it does for transformers."""
    merge = quantizers.merge_quantization_configs
    if hasattr(merge, "_kbit"):
        return

    @functools.wraps(merge)
    def merge_or_take(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        asked = quantization_config_from_args
        if not isinstance(asked, PlainConfig):
            return merge(quantization_config, asked)
        config = merge(quantization_config, None)
        if not isinstance(config, PlainConfig):
            return merge(quantization_config, asked)  # another library's checkpoint: diffusers' warning
        check_stored(config, asked, "bits", "format", "double_quant", "block_size")
        return with_run_time(config, asked)

    merge_or_take._kbit = True  # type: ignore[attr-defined]
    quantizers.merge_quantization_configs = staticmethod(merge_or_take)


class KbitDiffusersQuantizer(DiffusersQuantizer):
    """Quantizes a diffusers model tensor by tensor while it loads, and loads and saves kbit checkpoints.

    pre_quantized: the checkpoint is kbit's own; its codes and scales load as they are.
    """

    requires_calibration = False
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: PlainConfig, **kwargs: Any) -> None:
        super().__init__(KbitConfig.from_plain(quantization_config), **kwargs)
        self.modules: dict[str, QuantizedModule] = {}
        self.loaded_keys: list[str] = []
        self.trimmer = Trimmer()
        self._model: weakref.ref[nn.Module] | None = None

    # -- what diffusers asks ------------------------------------------------------------------------------------------

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """ValueError for what cannot work: quantizing while loading straight to disk."""
        device_map = kwargs.get("device_map")
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "kbit cannot quantize a diffusers model straight to disk: quantize it once without offloading, "
                "save_pretrained, and load the quantized checkpoint with this device_map"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Without one, diffusers would cast to the dtype of each Parameter: the default dtype, also for a weight."""
        return torch_dtype or torch.get_default_dtype()

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, Any]:
        """Bytes an element for device maps, while the weights on the meta device are still the floating point ones."""
        if self.pre_quantized:
            return {}
        from accelerate.utils import CustomDtype

        stored = CustomDtype.INT4 if self.quantization_config.weight_format.is_4bit else torch.int8
        return {f"{name}.weight": stored for name in self.modules}

    def get_cuda_warm_up_factor(self) -> int:
        # Elements of the compute dtype (2 bytes) for each element of the meta model.
        return 4 if not self.pre_quantized and self.quantization_config.weight_format.is_4bit else 2

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.loaded_keys = loaded_keys  # the only place that shows them
        return loaded_keys

    # -- loading ------------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        fused = select_experts(model, self.quantization_config)
        if fused:
            # Their keys change when they are quantized, and diffusers has no hook that renames keys.
            logger.warning("%s: fused expert weights are not quantized in diffusers models", next(iter(fused)))
            self.quantization_config.quantize_experts = False
        self.modules = convert.replace_empty(model, self.quantization_config)
        if not self.modules:
            logger.warning("nothing in this %s is quantized: skip_modules covers every layer", type(model).__name__)
        if not self.pre_quantized:
            # diffusers compares shapes with, and casts to, the Parameter in place: the floating point one until then.
            for module in self.modules.values():
                weight = torch.empty(tuple(module.weight_shape), dtype=module.weight_dtype, device="meta")
                module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        model.register_to_config(quantization_config=self.quantization_config)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Scales that do not exist yet are not missing; codes and scales that a kbit checkpoint lacks are an error."""
        if not self.pre_quantized:
            return [key for key in missing_keys if not self._is_scale(key)]
        lacking = sorted(key for key in missing_keys if keys.split(key, self.modules))
        if lacking:
            raise ValueError(
                f"the checkpoint lacks {', '.join(lacking[:3])} ({len(lacking)} keys). It is damaged or incomplete, or "
                "its config.json (skip_modules, double_quant) is not the one that it was saved with."
            )
        expected = set(model.state_dict())
        surplus = sorted(k for k in set(self.loaded_keys) - expected if k.rpartition(".")[2] in keys.SCALE_NAMES)
        if surplus:
            raise ValueError(
                f"the checkpoint holds {', '.join(surplus[:3])} ({len(surplus)} keys), for which this model has no "
                "place. Its config.json (skip_modules, double_quant) is not the one that it was saved with."
            )
        return missing_keys

    def _is_scale(self, key: str) -> bool:
        return keys.split(key, self.modules) is not None and key.rpartition(".")[2] in keys.SCALE_NAMES

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return keys.split(param_name, self.modules) is not None

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        name, part = param_name.rsplit(".", 1)
        keys.fit(param_name, loaded_param, self.modules[name], part)  # ValueError that names the key
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Place one tensor of the checkpoint: quantize a weight, or take a stored part as it is."""
        name, part = param_name.rsplit(".", 1)
        module = self.modules[name]
        if self.pre_quantized:
            parts = {part: keys.fit(param_name, param_value, module, part).to(target_device)}
        else:
            if not param_value.is_floating_point():
                raise ValueError(
                    f"{param_name} is {param_value.dtype} in the checkpoint, which is quantized already; its "
                    "config.json must say how (quantization_config)"
                )
            weight = param_value.to(target_device)
            module.weight_dtype = weight.dtype
            parts = quantize_in_pieces(weight, module.weight_format, param_name)
            self.trimmer.freed(weight.nbytes)
        for key, tensor in parts.items():
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in self.modules.items():
            away = offload.weights_map(module) is not None
            if not away and any(part.is_meta for part in module.parts().values()):
                raise ValueError(f"the checkpoint has no {name}.weight, and a quantized weight cannot be made up")
            if not away:
                module.set_parts(module.parts())  # checks shapes and dtypes once more
            if self.pre_quantized:
                module.weight_dtype = self._dtype_of(model)
            device = next((p.device for p in module.parameters(recurse=False) if not p.is_meta), torch.device("cpu"))
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta and buffer.numel() == 0:
                    module._buffers[key] = torch.empty(0, dtype=buffer.dtype, device=device)
        self._model = weakref.ref(model)
        trim()
        return model

    def _dtype_of(self, model: nn.Module) -> torch.dtype:
        return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())

    # -- saving, and back ---------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Parts as the modules hold them; offloaded tensors are read back."""
        model = self._model() if self._model is not None else None
        if model is not None and any(tensor.is_meta for tensor in state_dict.values()):
            state_dict = offload.full_state_dict(model)
        return state_dict, {}

    def dequantize(self, model: Any) -> Any:
        """The model with floating point layers again. Raises ValueError for a model with offloaded weights."""
        away = [name for name, module in self.modules.items() if offload.is_offloaded(module)]
        if away:
            raise ValueError(f"{away[0]} is offloaded; load the model without offloading to dequantize it")
        return convert.dequantize_model(model)  # `detach_from_diffusers` then removes this quantizer from the model


# ---- models that were quantized in memory ----


def _is_diffusers_model(model: nn.Module) -> bool:
    from diffusers.models.modeling_utils import ModelMixin

    return isinstance(model, ModelMixin)


def attach_to_diffusers(model: Any, config: PlainConfig) -> None:
    """Give a model that `kbit.quantize_model` converted what loading it quantized would have: save_pretrained works."""
    if not _is_diffusers_model(model):
        return
    quantizer = KbitDiffusersQuantizer(config, pre_quantized=True)
    quantizer.modules = ties.quantized_modules(model)
    quantizer._model = weakref.ref(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.register_to_config(quantization_config=quantizer.quantization_config)


def detach_from_diffusers(model: Any) -> None:
    """Take away what `attach_to_diffusers` or loading gave, from a model that is in floating point again."""
    if not _is_diffusers_model(model) or not isinstance(getattr(model, "hf_quantizer", None), KbitDiffusersQuantizer):
        return
    del model.hf_quantizer
    model.is_quantized = False
    vars(model).pop("quantization_method", None)
    kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
    model._internal_dict = type(model.config)(kept)
