"""Finds, compiles if need be, and loads the native library of this machine; picks the instruction set.

A wheel ships the library (`build.shipped_name`), with every level in it. Elsewhere, as in a checkout, it is compiled at
first use into the user's cache folder, for this machine's level alone, and found again by the hash of the sources, the
compiler and its version, the flags and the CPU's instruction sets. Two processes may compile at once.
Without a compiler everything runs in plain torch, and one log line says so.

KBIT_NATIVE=0 does without the library. KBIT_CPU_LEVEL names the highest level to use ("base", "avx2", "avx512",
"avx512bf16"; on ARM "base", "dotprod"). KBIT_NATIVE_FLAGS are further flags of the compiler, as for sanitizers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import functools
import hashlib
import logging
import os
import platform
import shlex
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kbit.kernels.cache import cache_folder
from kbit.kernels.cpu import build, threads

logger = logging.getLogger("kbit")

# enum Dtype of common.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

HOW_TO_GET_A_COMPILER = {
    "linux": "install g++ (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX",
    "darwin": "install the command line tools: xcode-select --install",
}

# The cache folder cannot hold a file.
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.ENOENT)


@dataclasses.dataclass(frozen=True)
class Library:
    """The loaded library and the level whose functions are used."""

    handle: ctypes.CDLL
    level: str
    path: Path


@functools.cache
def _find() -> Library | str:
    """The library, or in one line why there is none."""
    if os.environ.get("KBIT_NATIVE", "1").lower() in ("0", "off", "false", "no"):
        return "switched off by the environment variable KBIT_NATIVE"
    if sys.platform == "win32":
        return "no native kernels for Windows"
    try:
        return _load()
    except (OSError, build.BuildError, subprocess.SubprocessError) as error:
        remedy = HOW_TO_GET_A_COMPILER.get(sys.platform, "")
        reason = f"{error}: {remedy}" if "no C++ compiler" in str(error) else f"{error}"
        if "undefined symbol" in reason:
            reason += " (CXX has to name a C++ compiler: g++, not gcc)"
        if isinstance(error, OSError) and error.errno in _NO_PLACE:
            where = f"{cache_folder()} cannot be written ({error.strerror})"
            reason = f"{where}: set KBIT_CACHE to a folder where compiled kernels may be kept"
        logger.warning("kbit: CPU kernels run in plain torch, slower: %s", reason)
        return reason


def _load() -> Library:
    wanted = _wanted_levels()
    path = build.FOLDER / build.shipped_name()
    handle = None
    if path.exists() and not _extra_flags():
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as error:  # another C library than the one it was built for
            logger.info("kbit: the shipped CPU kernels cannot be loaded (%s); compiling them", error)
    if handle is None:
        path = _compiled(wanted)
        handle = ctypes.CDLL(str(path))
    for name in reversed(wanted):
        if hasattr(handle, f"kbit_optim_step_{name}") and handle.kbit_cpu_supports(list(build.levels()).index(name)):
            handle.kbit_set_parallel(ctypes.c_void_p(threads.gomp_parallel()))
            return Library(handle, name, path)
    raise OSError(f"{path} holds no code for this CPU")


def _extra_flags() -> list[str]:
    """Flags of $KBIT_NATIVE_FLAGS, after ours: sanitizers."""
    return shlex.split(os.environ.get("KBIT_NATIVE_FLAGS", ""))


def _wanted_levels() -> list[str]:
    """The levels up to KBIT_CPU_LEVEL, or all, in ascending order."""
    names = list(build.levels())
    highest = os.environ.get("KBIT_CPU_LEVEL") or names[-1]
    if highest not in names:
        raise OSError(f"KBIT_CPU_LEVEL={highest} does not exist on this machine; known: {', '.join(names)}")
    return names[: names.index(highest) + 1]


def _compiled(wanted: Sequence[str]) -> Path:
    """The library in the cache, compiled if it is not there: the highest level that machine and compiler know."""
    cxx = build.compiler()
    version = build.run([*cxx, "--version"])
    parts = [build.source_hash(), *cxx, version, *_extra_flags(), wanted[-1], sys.platform, _cpu_features()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    out = cache_folder() / f"native-{key}.so"
    if not (out.exists() and _is_whole(out)):
        out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        logger.warning("kbit: compiling the CPU kernels, once, into %s: up to a minute", out)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            probe = Path(scratch) / "probe.so"
            build.compile_platform(cxx, probe)
            supports = ctypes.CDLL(str(probe)).kbit_cpu_supports
            names = [name for index, name in enumerate(wanted) if supports(index)]
        for name in reversed(names):
            try:
                build.compile_library(out, [name], cxx, extra=_extra_flags())
                break
            except build.BuildError as error:
                if name == names[0]:
                    raise
                logger.warning("kbit: %s does not know the level %s of this CPU: %s", cxx[0], name, error)
    return out


def _is_whole(path: Path) -> bool:
    """Whether an ELF file is as long as its header says: loading one that was cut off ends the process."""
    if sys.platform == "darwin":
        return True
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return False
    (sections,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return path.stat().st_size >= int(sections) + int(size) * int(count)


def _cpu_features() -> str:
    """What tells CPUs with different instruction sets apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()
    except OSError:
        return platform.processor() + platform.machine()


def why_not() -> str | None:
    """None where the native kernels serve, else the reason in one line. Compiles them at the first question."""
    found = _find()
    return found if isinstance(found, str) else None


def available() -> bool:
    """Whether the native kernels serve."""
    return why_not() is None


def library() -> Library:
    """The loaded library. Raises RuntimeError where there is none."""
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(f"the native CPU kernels are not available: {found}")
    return found


@functools.cache
def function(name: str, argtypes: tuple[Any, ...], restype: Any = None) -> Callable[..., Any]:
    """An exported function `name`, in the version of this machine's level. Raises RuntimeError without a library."""
    found = library()
    call = getattr(found.handle, f"{name}_{found.level}")
    call.argtypes, call.restype = argtypes, restype
    return call


def reset() -> None:
    """Forget what was found, so that the next use looks again: for tests that change the environment."""
    _find.cache_clear()
    function.cache_clear()
