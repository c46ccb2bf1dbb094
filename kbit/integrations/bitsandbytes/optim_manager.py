"""`GlobalOptimManager`: settings for single parameters, registered apart from any optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from kbit.integrations.bitsandbytes.identity import lives_in


@lives_in("bitsandbytes.optim.optimizer")
class GlobalOptimManager:
    """Overrides such as `{"optim_bits": 32}` for parameters; every optimizer asks for them when it steps.

    There is one, from `get_instance()`. It holds no model alive, and an override works whether it is registered
    before or after the optimizer is constructed, and before or after the model moves to another device.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager is one for the whole process: call GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget every override."""
        self._parameters: dict[int, tuple[weakref.ref[Tensor], dict[str, Any]]] = {}
        self._modules: list[tuple[weakref.ref[nn.Module], str, dict[str, Any]]] = []
        # Counts changes, so that an optimizer knows whether it has seen them all.
        self.version = 0

    def register_parameters(self, params: Any) -> None:
        """Accepted for compatibility: overrides follow the parameter itself, so nothing has to be registered."""

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Give parameters their own value of an optimizer's setting, or several in key_value_dict.

        ValueError unless exactly one of the two ways is used.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError("override_config takes either a key and a value, or a key_value_dict")
        config = {key: value} if key is not None else dict(key_value_dict or {})
        for p in [parameters] if isinstance(parameters, Tensor) else parameters:
            _, known = self._parameters.get(id(p), (None, {}))
            self._parameters[id(p)] = (weakref.ref(p, self._forget(id(p))), {**known, **config})
        self.version += 1

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """The same for the parameter that `module` has under `param_name` when an optimizer steps."""
        self._modules = [entry for entry in self._modules if entry[0]() is not None]
        self._modules.append((weakref.ref(module), param_name, dict(config)))
        self.version += 1

    @property
    def module_weight_config_triple(self) -> list[tuple[nn.Module, str, dict[str, Any]]]:
        """Registered module overrides whose module is alive."""
        return [(module, name, config) for ref, name, config in self._modules if (module := ref()) is not None]

    def overrides(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every override of a parameter that is alive; an explicit one for the parameter comes after its module's."""
        found = []
        for module, name, config in self.module_weight_config_triple:
            p = getattr(module, name, None)
            if isinstance(p, Tensor):
                found.append((p, config))
        return found + [(p, config) for ref, config in self._parameters.values() if (p := ref()) is not None]

    def _forget(self, key: int) -> Any:
        this = weakref.ref(self)

        def forget(dead: weakref.ref[Tensor]) -> None:
            manager = this()
            if manager is not None and manager._parameters.get(key, (None,))[0] is dead:
                del manager._parameters[key]

        return forget
