"""`KbitQuantizer`: what every supported transformers has in common. `v4.py` and `v5.py` add how weights arrive."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from kbit.integrations.transformers import foreign, keys, offload, replaced, ties
from kbit.integrations.transformers.config import KbitConfig
from kbit.integrations.transformers.heap import Trimmer, trim
from kbit.integrations.transformers.pieces import quantize_in_pieces
from kbit.nn.base import QuantizedModule
from kbit.nn.convert import dequantize_model, is_conv1d_class, replace_empty
from kbit.nn.experts import ExpertWeight

if TYPE_CHECKING:
    from kbit.config import KbitConfig as PlainConfig

logger = logging.getLogger("kbit")
_ADJUST = "_adjust_missing_and_unexpected_keys"


class KbitQuantizer(HfQuantizer):
    """Quantizes a transformers model tensor by tensor while it loads, and loads and saves kbit checkpoints.

    pre_quantized: the checkpoint is kbit's own; its codes and scales load as they are.
    """

    requires_calibration = False
    quantization_config: KbitConfig

    def __init__(self, quantization_config: PlainConfig, **kwargs: Any) -> None:
        super().__init__(KbitConfig.from_plain(quantization_config), **kwargs)
        # The quantized modules by name, those that share weights, and keys that the checkpoint turned out to lack.
        self.modules: dict[str, QuantizedModule] = {}
        self.groups: ties.Groups = []
        self.missing: set[str] = set()
        # Where the checkpoint has another layout than the modules: what reads it.
        self.foreign: foreign.Foreign | None = None
        self.trimmer = Trimmer()

    # -- what transformers asks ---------------------------------------------------------------------------------------

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through quantized weights to adapters, biases and whatever is not quantized."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """True for every stored part of a quantized weight: we check and place them, transformers does not.

        Both versions also ask this before they compare shapes; those are compared here, with the key in the error.
        """
        if self.foreign is not None and param_name in self.foreign.floats:
            return True
        return keys.split(param_name, self.modules) is not None

    def note_dtype(self, config: Any, dtype: torch.dtype) -> None:
        """Keep the dtype of a model that was quantized in memory, where this version of transformers looks for it."""

    # -- before loading -----------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = list(kwargs.get("checkpoint_files") or [])
        if self.pre_quantized:
            self.foreign = foreign.open_checkpoint(model, self.quantization_config, files)
            if self.foreign is not None:
                self.quantization_config = self.foreign.config
        model.config.quantization_config = self.quantization_config
        replace_empty(model, self.quantization_config)
        self.modules = ties.quantized_modules(model)
        if not self.modules:
            logger.warning("nothing in this %s is quantized: skip_modules covers every layer", type(model).__name__)
        self.groups = ties.groups_of(model)
        ties.declare(model, self.groups)
        for module in self.modules.values():
            # transformers must not draw random numbers into codes.
            module._is_hf_initialized = True  # type: ignore[assignment]
            for part in module.parts().values():
                part._is_hf_initialized = True  # type: ignore[attr-defined]
        if self.pre_quantized and files and self.foreign is None:
            keys.check_headers(files, self.modules, model.base_model_prefix)
        self._watch_keys(model)
        return model

    def _watch_keys(self, model: Any) -> None:
        """See the missing and unexpected keys once transformers has sorted out those that it does not mind.

        No hook gives them to a quantizer. Versions differ in what the method takes and returns, so both are handled.
        """
        adjust: Callable[..., Any] | None = getattr(model, _ADJUST, None)
        if adjust is None:
            return

        def adjust_and_check(*args: Any, **kwargs: Any) -> Any:
            result = adjust(*args, **kwargs)
            if isinstance(result, tuple):
                missing, unexpected = result[:2]
                self._check_keys(model, set(missing), set(unexpected))
                kept = type(missing)(key for key in missing if not self._is_scale(key))
                if self.foreign is None:
                    return (kept, *result[1:])
                return (kept, type(unexpected)(self.foreign.unexpected(unexpected)), *result[2:])
            info = args[0] if args else kwargs["loading_info"]
            try:
                self._check_keys(model, set(info.missing_keys), set(info.unexpected_keys))
            except ValueError:
                # Its report is written on the way out; an error of its own would hide ours.
                info.mismatched_keys.clear()
                info.conversion_errors.clear()
                info.missing_keys.clear()
                info.unexpected_keys.clear()
                raise
            info.missing_keys = {key for key in info.missing_keys if not self._is_scale(key)}
            if self.foreign is not None:
                info.missing_keys -= {f"{name}.weight" for name in self.modules if self.foreign.has(name)}
                info.unexpected_keys = self.foreign.unexpected(info.unexpected_keys)
            return result

        setattr(model, _ADJUST, adjust_and_check)

    def _is_scale(self, key: str) -> bool:
        return keys.split(key, self.modules) is not None and key.rpartition(".")[2] in keys.SCALE_NAMES

    def _check_keys(self, model: Any, missing: set[str], unexpected: set[str]) -> None:
        if self.foreign is not None:
            missing, unexpected = self._take_foreign(model, missing, unexpected)
        if self.pre_quantized:
            keys.check_complete(model, self.modules, missing | self.missing, unexpected)
        for name in sorted({key.rpartition(".")[0] for key in missing | self.missing if keys.split(key, self.modules)}):
            if name in self.modules:
                self._make_new(model, name)

    def _take_foreign(self, model: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
        """The keys that are still missing or unexpected once what `self.foreign` reads is taken out."""
        assert self.foreign is not None
        foreign_keys = {key for key in missing | self.missing if self.foreign.has(key.rpartition(".")[0])}
        foreign_keys = {key for key in foreign_keys if keys.split(key, self.modules)}
        self.missing -= foreign_keys
        return missing - foreign_keys, self.foreign.unexpected(unexpected)

    def _make_new(self, model: Any, name: str) -> None:
        """A layer that the checkpoint does not have is new: floating point, drawn as the model draws, trainable."""
        skipped = replaced.skipped_modules(model, self.quantization_config)
        module = self.modules[name]
        if isinstance(module, ExpertWeight):
            raise ValueError(f"the checkpoint lacks {name}, the weights of experts: it is damaged or incomplete")
        places = [place for place, other in self.modules.items() if other is module]
        self.quantization_config = copy.copy(self.quantization_config)
        self.quantization_config.skip_modules = [*skipped, *places]  # or a saved copy would expect its codes
        device = next((p.device for p in module.parts().values() if not p.is_meta), torch.device("cpu"))
        if is_conv1d_class(module.original_class):
            new = module.original_class(module.out_features, module.in_features)
        elif isinstance(module, nn.Linear):
            new = module.original_class(module.in_features, module.out_features, module.bias is not None)
        else:
            new = module.original_class(module.num_embeddings, module.embedding_dim, module.padding_idx)
        new = new.to(device=device, dtype=module.weight_dtype)
        model._init_weights(new)
        bias = getattr(module, "bias", None)
        if bias is not None and not bias.is_meta:
            new.bias = bias
        for place in places:
            del self.modules[place]
            model.set_submodule(place, new)

    # -- one weight ---------------------------------------------------------------------------------------------------

    def quantize(self, key: str, weight: Tensor) -> dict[str, Tensor]:
        """The parts, by full key, of the weight that a checkpoint stores under `key`.

        Raises ValueError that names the key where the weight is no weight of this module, or holds NaN or infinity.
        """
        name, _ = key.rsplit(".", 1)
        module = self.modules[name]
        if is_conv1d_class(module.original_class):
            weight = weight.t()
        elif isinstance(module, ExpertWeight) and module.transposed:
            weight = weight.transpose(1, 2)
        if not weight.is_floating_point() or weight.shape != module.weight_shape:
            raise ValueError(
                f"{key} is {weight.dtype} {list(weight.shape)} in the checkpoint; a floating point weight of "
                f"{list(module.weight_shape)} was expected. If it is quantized already, its config.json must say how "
                "(quantization_config)."
            )
        module.weight_dtype = weight.dtype
        return {f"{name}.{part}": t for part, t in quantize_in_pieces(weight, module.weight_format, key).items()}

    # -- after loading ------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        vars(model).pop(_ADJUST, None)
        self._settle_weights(model)
        ties.trim_biases(model, self.groups)
        trim()
        model.config.quantization_config = self.quantization_config
        # Keys are saved as the modules have them, not renamed back to those of the checkpoint they came from.
        model._weight_conversions = []
        return model

    def _settle_weights(self, model: Any) -> None:
        group_of = {name: names for names in self.groups for name in names}
        done: set[str] = set()
        for name, module in self.modules.items():
            if name in done:
                continue
            names = [n for n in group_of.get(name, [name]) if n in self.modules]
            done.update(names)
            if module.weight.is_meta:
                if self.foreign is not None and self.foreign.has(name):
                    self.foreign.refuse_offloaded(name, module.weight)
                offload.settle(names, module, self.modules)
            else:
                parts = {p: keys.fit(f"{name}.{p}", t, module, p) for p, t in module.parts().items()}
                shared = {p: t if t is module._parameters[p] else _frozen(t) for p, t in parts.items()}
                for twin in names:
                    self.modules[twin].set_parts(shared)
            for twin in names:
                self.modules[twin].weight_dtype = module.weight_dtype
                _place_buffers(self.modules[twin])

    # -- saving -------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, model: Any, safe_serialization: bool | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict as it is written: int8 codes `[N, K, 1]` (see `keys.stored_shape`), offloaded tensors read."""
        if not getattr(model, "_hf_peft_config_loaded", False):
            self.quantization_config = replaced.note_floating_point(model, self.quantization_config)
            model.config.quantization_config = self.quantization_config
        state = offload.full_state_dict(model)
        expected = self.quantization_config.weight_format
        for name, module in ties.quantized_modules(model).items():
            # With adapters that transformers itself manages, save_pretrained writes the adapter alone.
            if name.endswith((".base_layer", ".original_module")) and not getattr(
                model, "_hf_peft_config_loaded", False
            ):
                raise ValueError(
                    f"{name} is wrapped by a PEFT adapter, and a checkpoint with such keys could not be loaded again: "
                    "save the adapter with the PEFT model's save_pretrained, or merge it first with kbit.merge_adapters"
                )
            if module.weight_format != expected:
                raise ValueError(
                    f"{name} is stored as {module.weight_format}, but the model's config says {expected}: a model that "
                    "was quantized in several formats cannot be saved with one quantization_config"
                )
            for part in module.parts():
                key = f"{name}.{part}"
                if key in state:
                    state[key] = state[key].view(keys.stored_shape(module, part))
        return state, {}

    # -- back ---------------------------------------------------------------------------------------------------------

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The model with floating point layers again, each in the dtype that was quantized unless one is given.

        Raises ValueError for a model with offloaded weights.
        """
        quantized = ties.quantized_modules(model)
        away = [name for name, module in quantized.items() if offload.is_offloaded(module)]
        if away:
            raise ValueError(f"{away[0]} is offloaded; load the model without offloading to dequantize it")
        layers = {name: m for name, m in quantized.items() if not isinstance(m, ExpertWeight)}
        hooks = {name: m._hf_hook for name, m in layers.items() if hasattr(m, "_hf_hook")}
        model = dequantize_model(model, dtype)  # `attach.detach` then removes this quantizer from the model
        if hooks:
            from accelerate.hooks import add_hook_to_module

            for name, hook in hooks.items():
                add_hook_to_module(model.get_submodule(name), hook)
        return model


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _place_buffers(module: nn.Module) -> None:
    """Buffers that only carry a dtype hold no values, so nothing loads them off the meta device."""
    device = next((p.device for p in module.parameters(recurse=False) if not p.is_meta), torch.device("cpu"))
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta and buffer.numel() == 0:
            module._buffers[name] = torch.empty(0, dtype=buffer.dtype, device=device)


def quantizer_class() -> type[KbitQuantizer]:
    """The quantizer for the transformers that is installed, told apart by the hooks it has."""
    if hasattr(HfQuantizer, "create_quantized_param"):
        from kbit.integrations.transformers.v4 import KbitQuantizerV4

        return KbitQuantizerV4
    from kbit.integrations.transformers.v5 import KbitQuantizerV5

    return KbitQuantizerV5
