"""torch's own worker threads for native code.

torch's OpenMP workers spin for about a millisecond after each of their regions. Threads of another pool would share
the cores with them; so kernels run on the same workers, through the OpenMP runtime that torch has already loaded.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path


@functools.cache
def gomp_parallel() -> int | None:
    """Address of `GOMP_parallel(fn, data, threads, flags)` in torch's OpenMP runtime; None where it has another one."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    # More than one where other packages bring their own; torch's lies in torch/lib or is the system's.
    paths = sorted(set(re.findall(r"/\S*libgomp\S*\.so\S*", maps)), key=lambda path: "/torch/" not in path)
    for path in paths:
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
