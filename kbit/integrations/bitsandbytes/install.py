"""Putting the folder that holds kbit's `bitsandbytes` on the path, for this process or for others."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "bitsandbytes"


def shim_path() -> Path:
    """The folder to put on `sys.path` or `PYTHONPATH`: it holds the package `bitsandbytes` and its metadata."""
    return Path(__file__).parent / "shim"


def real_bitsandbytes() -> str | None:
    """Where a bitsandbytes that is not kbit's would be imported from, with its version; None if there is none."""
    ours = str(shim_path())
    paths = [path for path in sys.path if path != ours]
    loaded = sys.modules.get(_NAME)
    file = getattr(loaded, "__file__", None)
    if loaded is not None and (file is None or not file.startswith(ours)):
        return f"bitsandbytes {getattr(loaded, '__version__', 'of unknown version')} ({file or 'no file'})"
    spec = importlib.machinery.PathFinder.find_spec(_NAME, paths)
    if spec is None or spec.loader is None:
        return None
    found = list(importlib.metadata.distributions(name=_NAME, path=paths))
    version = found[0].version if found else "of unknown version"
    return f"bitsandbytes {version} ({spec.origin})"


def install_as_bitsandbytes(override: bool = False) -> None:
    """Have `import bitsandbytes`, and every library that asks for it, get kbit in this process.

    Call it before models are loaded; libraries that are imported already are told. Calling it again does nothing.
    override: take precedence over a bitsandbytes that is installed. Without it a real one wins, and this call says so
    with a RuntimeError. With a real one already imported it is a RuntimeError in any case: its classes are in use.
    """
    path = str(shim_path())
    real = real_bitsandbytes()
    if real is not None:
        if _NAME in sys.modules and not _is_ours(sys.modules[_NAME]):
            raise RuntimeError(
                f"{real} is imported already and stays in use: call install_as_bitsandbytes() before anything imports "
                "it, or start the script with `kbit run`"
            )
        if not override:
            raise RuntimeError(
                f"{real} is installed, and it wins over kbit. Uninstall it, start the script with `kbit run`, or call "
                "install_as_bitsandbytes(override=True)"
            )
    if path not in sys.path:
        sys.path.insert(0, path) if override else sys.path.append(path)
    elif override and real is not None:
        sys.path.remove(path)
        sys.path.insert(0, path)
    importlib.invalidate_caches()
    tell_libraries()


def _is_ours(module: ModuleType) -> bool:
    return str(getattr(module, "__file__", "")).startswith(str(shim_path()))


def tell_libraries() -> None:
    """Have libraries that were imported before ask again whether there is a bitsandbytes.

    They remember the answer in functions with a cache and in module variables.
    """
    for module, names in {
        "transformers.utils.import_utils": ("is_bitsandbytes_available", "_package_distribution_mapping"),
        "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    }.items():
        for name in names:
            clear = getattr(getattr(sys.modules.get(module), name, None), "cache_clear", None)
            if clear is not None:
                clear()
    _set("transformers.utils.import_utils", "_bitsandbytes_available", True)  # transformers 4
    _set("diffusers.utils.import_utils", "_bitsandbytes_available", True)
    _set("diffusers.utils.import_utils", "_bitsandbytes_version", _version)
    integration = sys.modules.get("transformers.integrations.bitsandbytes")
    if integration is not None and not hasattr(integration, "bnb"):
        importlib.reload(integration)  # its imports depend on the answer; functions taken from it see the new ones


def _set(module: str, name: str, value: Any) -> None:
    found = sys.modules.get(module)
    if found is not None and hasattr(found, name):
        setattr(found, name, value() if callable(value) else value)


def _version() -> str:
    return importlib.metadata.version(_NAME)
