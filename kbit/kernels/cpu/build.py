"""Compiles the C++ sources of this folder into one shared library, for one or several instruction sets.

Standard library only, no import of kbit: the package's build runs this file too. Every kernel source is compiled once
a level, with that level's flags, and its exported functions carry the level as a suffix; `platform.cpp`, compiled for
the oldest machine, tells which levels a machine can run.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
# One operation (or a few that share their inner loop) a source.
KERNELS = ("linear_4bit", "linear_8bit", "optim", "quantize")
PLATFORM = "platform"

# No fused multiply-add and no relaxed arithmetic: results must equal the plain torch path to the bit.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
# Flags of each level, in ascending order; the position is KBIT_LEVEL, which `platform.cpp` knows too.
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86": {
        "base": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512bf16": (*_AVX512, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512bf16"),
    },
    "arm": {"base": (), "dotprod": ("-march=armv8.2-a+dotprod+fp16",)},
    "other": {"base": ()},
}


class BuildError(RuntimeError):
    """Why the library could not be compiled, in one line."""


def levels(machine: str | None = None) -> dict[str, tuple[str, ...]]:
    """Name and flags of the levels of a machine (this one), in ascending order."""
    machine = (machine or platform.machine()).lower()
    family = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}.get(machine, "other")
    return LEVELS[family]


def level_flags(level: str, machine: str | None = None) -> list[str]:
    """What a kernel source is compiled with for a level, beside FLAGS."""
    known = levels(machine)
    number = list(known).index(level)
    return [*known[level], "-fno-exceptions", "-fno-rtti", f"-DKBIT_LEVEL={number}", f"-DKBIT_SUFFIX={level}"]


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, else c++, g++ or clang++. Raises BuildError where there is none."""
    named = os.environ.get("CXX", "").split()
    if named and shutil.which(named[0]) is None:
        raise BuildError(f"no C++ compiler found (CXX={' '.join(named)} is no program on PATH)")
    chosen = named or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not chosen:
        raise BuildError("no C++ compiler found")
    return chosen


def source_hash() -> str:
    """Identifies what would be compiled: every source and header, and the flags."""
    digest = hashlib.sha256(repr((FLAGS, LEVELS, KERNELS)).encode())
    for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def shipped_name() -> str:
    """File name of the library that the package's build puts beside the sources."""
    return f"_native-{source_hash()}.so"


def run(command: Sequence[str]) -> str:
    """Run a compiler. Raises BuildError with the end of what it said."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-500:] or f'code {done.returncode}'}")
    return done.stdout


def compile_platform(cxx: Sequence[str], out: Path) -> None:
    """The part that knows the machine, alone, as a library: compiled in no time."""
    run([*cxx, *FLAGS, "-shared", str(FOLDER / f"{PLATFORM}.cpp"), "-o", str(out)])


def compile_library(
    out: Path, names: Sequence[str], cxx: Sequence[str], machine: str | None = None, extra: Sequence[str] = ()
) -> None:
    """Compile and link the levels `names` into `out`, which appears complete or not at all.

    Raises BuildError. A level above "base" that the compiler does not know is left out, if another is there.
    """
    out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:

        def compile_one(source: str, level: str | None) -> Path:
            made = Path(scratch) / f"{source}-{level}.o"
            chosen: Sequence[str] = ()
            if level is not None:
                chosen = level_flags(level, machine)
            run([*cxx, *FLAGS, *chosen, *extra, "-c", str(FOLDER / f"{source}.cpp"), "-o", str(made)])
            return made

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            jobs = {level: [pool.submit(compile_one, source, level) for source in KERNELS] for level in names}
            objects = [compile_one(PLATFORM, None)]
            failures: list[BuildError] = []
            for kernels in jobs.values():
                try:
                    objects += [job.result() for job in kernels]
                except BuildError as error:
                    failures.append(error)
        if len(failures) == len(jobs):
            raise failures[0]
        library = Path(scratch) / out.name
        run([*cxx, *FLAGS, *extra, "-shared", *map(str, objects), "-o", str(library)])
        os.replace(library, out)
