"""Compile the CPU kernels and check.cpp for a machine, every level, and run what it can run, perhaps under emulation.

`make native-arm` shows how to call it.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("build", HERE.parents[2] / "kbit" / "kernels" / "cpu" / "build.py")
assert SPEC is not None and SPEC.loader is not None
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxx", default="c++")
    parser.add_argument("--machine", default=platform.machine())
    parser.add_argument("--run", default="", help="what runs a program of that machine")
    parser.add_argument("--levels", help="comma-separated; all")
    parser.add_argument("--flags", default="", help="more flags of the compiler, such as sanitizers")
    args = parser.parse_args()
    worst = 0
    for level in (args.levels or ",".join(build.levels(args.machine))).split(","):
        with tempfile.TemporaryDirectory() as folder:
            library, program = Path(folder) / "libkbit.so", Path(folder) / "check"
            cxx, extra = args.cxx.split(), args.flags.split()
            build.compile_library(library, [level], cxx, args.machine, extra)
            flags = [*build.FLAGS, *extra, f"-DKBIT_SUFFIX={level}"]
            build.run([*cxx, *flags, str(HERE / "check.cpp"), str(library), f"-Wl,-rpath,{folder}", "-o", str(program)])
            print(f"{args.machine} {level}:", end=" ", flush=True)
            worst = max(worst, subprocess.run([*args.run.split(), str(program)]).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
