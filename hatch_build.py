"""Build hook: compiles the CPU kernels into the wheel, for every instruction set. Never makes a build fail.

Without a compiler the wheel is pure Python: the kernels are then compiled at first use where a compiler is found, and
plain torch serves where none is. An editable installation compiles at first use too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or self.target_name != "wheel" or sys.platform == "win32":
            return
        if os.environ.get("KBIT_NATIVE") == "0":
            return
        path = Path(self.root) / "kbit" / "kernels" / "cpu" / "build.py"
        try:  # by its path: importing kbit would import torch, which an isolated build does not have
            spec = importlib.util.spec_from_file_location("kbit_native_build", path)
            assert spec is not None and spec.loader is not None
            build = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(build)
            self._scratch = tempfile.TemporaryDirectory()
            library = Path(self._scratch.name) / build.shipped_name()
            build.compile_library(library, list(build.levels()), build.compiler())
        except Exception as error:
            self.app.display_warning(f"kbit: CPU kernels not compiled, they will be at first use: {error}")
            return
        build_data["force_include"][str(library)] = f"kbit/kernels/cpu/{library.name}"
        # One binary for every Python and torch of a platform: it knows neither.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if scratch := getattr(self, "_scratch", None):
            scratch.cleanup()
