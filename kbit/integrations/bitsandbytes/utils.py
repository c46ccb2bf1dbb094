"""bitsandbytes.utils: outlier statistics of linear layers, and helpers that scripts import from there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kbit.checkpoint.bnb import INT8_LAYOUTS
from kbit.integrations.bitsandbytes.identity import lives_in

logger = logging.getLogger(__name__)

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {name: number for number, name in INT8_LAYOUTS.items()}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = dict(INT8_LAYOUTS)


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """Columns whose standard deviation is an outlier among all columns of `weight`.

    zscore: from how many standard deviations on. topk: the largest so many instead. rdm: so many at random instead.
    """
    if rdm:
        return torch.randint(0, weight.shape[1], size=(topk or 0,), device=weight.device)
    deviation = weight.std(reduction_dim)
    if topk is not None:
        return deviation.topk(topk).indices
    return ((deviation - deviation.mean()) / deviation.std() > zscore).nonzero().view(-1)


@lives_in("bitsandbytes.utils")
class OutlierTracer:
    """The outlier columns of each linear layer of a model, as LLM.int8() research looks at them.

    The first linear layer that runs is judged by its input, every other one by its weight. There is one tracer, from
    `get_instance()`; call `initialize(model)` before running the model.
    """

    _instance: OutlierTracer | None = None

    def __init__(self) -> None:
        raise RuntimeError("OutlierTracer is one for the whole process: call OutlierTracer.get_instance()")

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance

    def initialize(self, model: nn.Module) -> None:
        """Watch every linear layer of `model`, until each has run once."""
        self.outliers: list[Tensor] = []
        self._by_weight: dict[int, Tensor] = {}
        self.hooks = [
            module.register_forward_pre_hook(_trace) for module in model.modules() if isinstance(module, nn.Linear)
        ]
        self.initialized = True

    def is_initialized(self) -> bool:
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: Tensor) -> int:
        return weight.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """Outlier columns of the layer that holds `weight`; None if it has not run yet."""
        if not self.is_initialized():
            logger.warning("call OutlierTracer.get_instance().initialize(model) first: no outliers are known")
            return None
        return self._by_weight.get(self.get_hvalue(weight))

    def _add(self, module: nn.Linear, x: Tensor) -> None:
        key = self.get_hvalue(module.weight)
        if key in self._by_weight:
            return
        columns = find_outlier_dims(module.weight.detach())
        self.outliers.append(columns)
        if len(self.outliers) == 1:
            rows = x.detach().reshape(-1, x.shape[-1])
            large = (rows.abs() > 6).any(dim=0).nonzero().view(-1)
            by_column = rows.std(0) if len(rows) > 1 else rows.abs().view(-1)
            spread = (by_column - by_column.mean()) / by_column.std()
            columns = torch.cat([(spread > 3).nonzero().view(-1), large]).unique()
        self._by_weight[key] = columns
        if len(self._by_weight) >= len(self.hooks):
            for hook in self.hooks:
                hook.remove()


def _trace(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    assert isinstance(module, nn.Linear)
    OutlierTracer.get_instance()._add(module, inputs[0])


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[..., nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Replace every nn.Linear below `model` by `linear_replacement(in_features, out_features, has_bias)`, in place.

    skip_modules: names of children to leave. copy_weights: put the old weight and bias Parameters into the new layer.
    post_processing_function: name of a method of the old layer to call afterwards. Returns the model.
    """
    for name, module in model.named_children():
        if len(list(module.children())) > 0:
            replace_linear(module, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(module, nn.Linear) or name in skip_modules:
            continue
        new = linear_replacement(module.in_features, module.out_features, module.bias is not None)
        if copy_weights:
            new.weight, new.bias = module.weight, module.bias
        model._modules[name] = new
        if post_processing_function is not None and hasattr(module, post_processing_function):
            getattr(module, post_processing_function)(module)
    return model


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Run a command without a shell; its stdout and stderr, stripped."""
    import shlex
    import subprocess

    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr.strip()


def sync_gpu(t: Tensor) -> None:
    """Wait for the device of a tensor."""
    if t.device.type in ("cuda", "xpu"):
        getattr(torch, t.device.type).synchronize(t.device)


def get_ptr(A: Tensor | None) -> Any:
    """The address of a tensor's first element as a ctypes pointer; None stays None."""
    import ctypes

    return None if A is None else ctypes.c_void_p(A.data_ptr())


def is_on_gpu(tensors: Any) -> bool:
    """True where all tensors (None left out) are on one device. RuntimeError that lists them otherwise."""
    found = [t for t in tensors if t is not None and not getattr(t, "is_paged", False)]
    if len({t.device for t in found}) > 1:
        listed = ", ".join(f"{list(t.shape)} on {t.device}" for t in found)
        raise RuntimeError(f"these tensors have to be on one device: {listed}")
    return True


def has_avx512bf16() -> bool:
    """Whether weights would be laid out again for AVX512-BF16 on a CPU: never, kbit reads the stored layout."""
    return False
