"""Compile a C++ source of this package at first use, and keep the library in the user's cache folder.

A library is found again by the hash of its source, the compiler and its version, the flags and the CPU's instruction
sets, so a new version, compiler or machine compiles afresh. Written to a temporary name, then renamed: two processes
may do it at once. Without a compiler `load` returns None and says so in one log line: callers have a plain torch path.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger("kbit")

# No fused multiply-add and no relaxed arithmetic: results must equal the plain torch path to the bit.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fvisibility=default",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
)
_NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}


def cache_folder() -> Path:
    """Where compiled libraries live: $KBIT_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("KBIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kbit"


@functools.cache
def load(source: Path, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The compiled library of a C++ source, or None where it cannot be compiled (one log line says why)."""
    try:
        return ctypes.CDLL(str(_build(source, extra_flags)))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        logger.warning("kbit: %s runs in plain torch, slower: %s", source.stem, error)
        return None


def _build(source: Path, extra_flags: tuple[str, ...]) -> Path:
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        raise RuntimeError("no C++ compiler found (install g++ or clang++, or set CXX)")
    command = compiler.split()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    text = source.read_bytes()
    flags = [*FLAGS, *extra_flags]
    native = _NATIVE.get(platform.machine())
    parts = [text.decode(), *command, version, *flags, str(native), sys.platform, _cpu_features()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = cache_folder()
    library = folder / f"{source.stem}-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / library.name
        tries = [[*flags, native], flags] if native else [flags]
        for number, chosen in enumerate(tries, 1):
            run = subprocess.run(
                [*command, *chosen, str(source), "-o", str(out)], capture_output=True, text=True, timeout=300
            )
            if run.returncode == 0:
                break
            if number == len(tries):
                raise RuntimeError(f"{compiler} failed: {run.stderr.strip()[-500:]}")
        os.replace(out, library)
    return library


def _cpu_features() -> str:
    """What tells CPUs with different instruction sets apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()
    except OSError:
        return platform.processor() + platform.machine()
