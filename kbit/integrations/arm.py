"""Plugs kbit into transformers, PEFT and diffusers when, and only when, they are imported.

`import kbit` must not import transformers (seconds), yet `from_pretrained` has to know `quant_method: "kbit"` whichever
of the two was imported first. A finder on `sys.meta_path` waits for the modules named in `_PLUGS`, lets the usual
machinery import them, and plugs in right after. For transformers that is `transformers.quantizers.auto`, the module
that holds the registries; waiting for it and not for the package also covers `importlib.reload`, which gives it new,
empty registries.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

_lock = threading.Lock()


class ImportWatcher(importlib.abc.MetaPathFinder):
    """Finds one module through the other finders, and has `on_import` called once its code has run."""

    def __init__(self, name: str, on_import: Callable[[], None]) -> None:
        self.name = name
        self.on_import = on_import

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = None
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            if find_spec is None or _is_watcher(finder):
                continue
            spec = find_spec(fullname, path, target)
            if spec is not None:
                break
        if spec is None or spec.loader is None:
            return spec
        self._call_after(spec.loader)
        return spec

    def _call_after(self, loader: importlib.abc.Loader) -> None:
        # The loader keeps its class, because other code asks it for its source or its resources; only this one call
        # is wrapped, once.
        exec_module = loader.exec_module

        def exec_and_report(module: ModuleType) -> None:
            exec_module(module)
            if module.__name__ == self.name:
                self.on_import()

        loader.exec_module = exec_and_report  # type: ignore[method-assign]


def _is_watcher(finder: object) -> bool:
    # By name: after importlib.reload of this module, watchers of the class as it was before are still in place.
    return type(finder).__name__ == ImportWatcher.__name__


def _plug_transformers() -> None:
    from kbit.integrations.transformers import register

    register()


def _plug_peft() -> None:
    from kbit.integrations.peft import register

    register()


def _plug_diffusers() -> None:
    from kbit.integrations.diffusers import register

    register()


def _plug_experts() -> None:
    from kbit.integrations.transformers.moe import register

    register()


def _plug_resizing() -> None:
    from kbit.integrations.transformers.replaced import register

    register()


_PLUGS: dict[str, Callable[[], None]] = {
    "transformers.quantizers.auto": _plug_transformers,
    "transformers.integrations.moe": _plug_experts,
    "transformers.modeling_utils": _plug_resizing,
    "peft": _plug_peft,
    "diffusers.quantizers.auto": _plug_diffusers,
}


def _plug(name: str) -> None:
    """Plug in now. A failure is a warning: it must not break the import for those who do not use kbit."""
    library = name.partition(".")[0]
    try:
        _PLUGS[name]()
    except Exception as error:  # whatever a version that we have not seen throws
        warnings.warn(
            f"kbit could not plug itself into {library} ({type(error).__name__}: {error}); quantized models will not "
            "work with it. kbit supports transformers 4.57, peft 0.21 and diffusers 0.42, and newer ones.",
            stacklevel=2,
        )


def arm() -> None:
    """Have kbit plugged into transformers, PEFT and diffusers: at once if imported already, else when they are.

    Imports nothing by itself, may be called any number of times and from any thread.
    """
    with _lock:
        watched = {finder.name for finder in sys.meta_path if _is_watcher(finder)}  # type: ignore[attr-defined]
        for name in _PLUGS.keys() - watched:
            sys.meta_path.insert(0, ImportWatcher(name, lambda name=name: _plug(name)))  # type: ignore[misc]
    for name in _PLUGS:
        # While another thread is still running that module, the finder (or the import lock) does the work.
        if name in sys.modules:
            _plug(name)
