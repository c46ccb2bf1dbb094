"""Where kernels that are compiled at first use are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$KBIT_CACHE, else `kbit` in the user's cache folder."""
    if chosen := os.environ.get("KBIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kbit"
