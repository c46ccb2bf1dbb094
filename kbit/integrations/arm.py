"""Registers kbit in transformers when, and only when, transformers is imported.

`import kbit` must not import transformers (seconds), yet `from_pretrained` has to know `quant_method: "kbit"` whichever
of the two was imported first. A finder on `sys.meta_path` waits for `transformers.quantizers.auto`, the module that
holds the registries, lets the usual machinery import it, and registers right after. Waiting for that module and not
for the package also covers `importlib.reload`, which gives it new, empty registries.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

_TARGET = "transformers.quantizers.auto"
_lock = threading.Lock()


class QuantizerModuleFinder(importlib.abc.MetaPathFinder):
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
            if find_spec is None or isinstance(finder, QuantizerModuleFinder):
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


def _register() -> None:
    """Register now. A failure is a warning: it must not break `import transformers` for those who do not use kbit."""
    try:
        from kbit.integrations.transformers import register

        register()
    except Exception as error:  # whatever a transformers that we have not seen throws
        warnings.warn(
            f"kbit could not register itself in transformers ({type(error).__name__}: {error}); "
            "from_pretrained will not accept a KbitConfig. kbit supports transformers 4.57 and newer.",
            stacklevel=2,
        )


def arm() -> None:
    """Have kbit registered in transformers: at once where transformers is imported already, else when it is.

    Imports nothing by itself, may be called any number of times and from any thread.
    """
    with _lock:
        if not any(getattr(type(finder), "__name__", "") == "QuantizerModuleFinder" for finder in sys.meta_path):
            sys.meta_path.insert(0, QuantizerModuleFinder(_TARGET, _register))
    module = sys.modules.get(_TARGET)
    # While another thread is still running that module, the finder (or the import lock below) does the work.
    if module is not None:
        _register()
