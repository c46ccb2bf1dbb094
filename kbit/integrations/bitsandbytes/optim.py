"""bitsandbytes.optim: kbit's optimizers under the class paths that Trainer and scripts look for.

Each class is kbit.optim's of the same name; what is added is the GlobalOptimManager, whose overrides are applied in
the step after they were registered, and keywords that earlier bitsandbytes had.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from kbit import optim as native
from kbit.integrations.bitsandbytes.identity import lives_in
from kbit.integrations.bitsandbytes.optim_manager import GlobalOptimManager

# Removed from bitsandbytes in 0.50: accepted with a warning where they ask for what happens anyway.
_OLD_KEYWORDS = {"percentile_clipping": 100, "block_wise": True}


@lives_in("bitsandbytes.optim.optimizer")
class Optimizer8bit(torch.optim.Optimizer):
    """The common base of these optimizers, for isinstance checks.

    Other packages (GaLore) derive from it and from the two below to reach into the update of single parameters,
    which kbit runs in one launch for all: constructing such a class raises NotImplementedError.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, native.KbitOptimizer):
            raise NotImplementedError(
                f"{type(self).__name__} hooks into bitsandbytes' update of single parameters, which kbit lacks: "
                "use its 32-bit variant (galore_adamw instead of galore_adamw_8bit), or kbit.optim.AdamW8bit"
            )
        super().__init__(*args, **kwargs)


@lives_in("bitsandbytes.optim.optimizer")
class Optimizer1State(Optimizer8bit):
    """Base of the optimizers with one state."""


@lives_in("bitsandbytes.optim.optimizer")
class Optimizer2State(Optimizer8bit):
    """Base of the optimizers with two states."""


class _Managed(native.KbitOptimizer):
    """Asks the GlobalOptimManager for overrides, and takes keywords of earlier versions and any label of a group."""

    free_keys = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in _OLD_KEYWORDS.keys() & kwargs.keys():
            value = kwargs.pop(name)
            if value != _OLD_KEYWORDS[name]:
                advice = "clip with torch.nn.utils.clip_grad_norm_" if name == "percentile_clipping" else "leave it out"
                raise ValueError(f"{name}={value!r} was removed from bitsandbytes: {advice}")
            warnings.warn(f"{name} has no effect any more and can be left out", FutureWarning, stacklevel=2)
        self._seen_overrides = -1
        super().__init__(*args, **kwargs)

    def _run(self) -> None:
        self._take_overrides()
        super()._run()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._take_overrides()  # Trainer has registered them by now; they say which states there are
        super().load_state_dict(state_dict)

    def _take_overrides(self) -> None:
        manager = GlobalOptimManager.get_instance()
        if manager.version != self._seen_overrides:
            own = {p for group in self.param_groups for p in group["params"]}
            for p, config in manager.overrides():
                if p in own and config:
                    self.override(p, **config)
            self._seen_overrides = manager.version  # last: one that is refused is refused again, and none is lost

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen_overrides = -1


# Module of bitsandbytes.optim -> number of states, class names.
_FAMILIES: dict[str, tuple[int, tuple[str, ...]]] = {
    "adagrad": (1, ("Adagrad", "Adagrad8bit", "Adagrad32bit")),
    "adam": (2, ("Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit")),
    "adamw": (2, ("AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit")),
    "ademamix": (
        2,
        ("AdEMAMix", "AdEMAMix8bit", "AdEMAMix32bit", "PagedAdEMAMix", "PagedAdEMAMix8bit", "PagedAdEMAMix32bit"),
    ),
    "lamb": (2, ("LAMB", "LAMB8bit", "LAMB32bit")),
    "lars": (1, ("LARS", "LARS8bit", "LARS32bit")),
    "lion": (1, ("Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit")),
    "rmsprop": (1, ("RMSprop", "RMSprop8bit", "RMSprop32bit")),
    "sgd": (1, ("SGD", "SGD8bit", "SGD32bit")),
}


def _make(name: str, module: str, states: int) -> type[native.KbitOptimizer]:
    base = getattr(native, name)
    marker = Optimizer1State if states == 1 else Optimizer2State
    names = {"__module__": f"bitsandbytes.optim.{module}", "__doc__": base.__doc__, "__qualname__": name}
    return type(name, (_Managed, base, marker), names)


for _module, (_states, _names) in _FAMILIES.items():
    for _name in _names:
        globals()[_name] = _make(_name, _module, _states)


@lives_in("bitsandbytes.optim.lars")
class PytorchLARS(globals()["LARS32bit"]):  # type: ignore[misc]
    """LARS with 32-bit states and a default learning rate."""

    def __init__(self, params: Any, lr: float = 0.01, **kwargs: Any) -> None:
        super().__init__(params, lr, **kwargs)
