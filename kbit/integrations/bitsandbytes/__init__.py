"""kbit under the name bitsandbytes: scripts and libraries written for it run unchanged. See docs/guide-dropin.md.

The folder `shim` holds the package `bitsandbytes` and its metadata; `kbit run`, PYTHONPATH or
`kbit.install_as_bitsandbytes()` put it on the path. The state machines that its users rely on (parameters that quantize
themselves when they are moved) exist only here.
"""

from __future__ import annotations

from kbit.integrations.bitsandbytes.install import install_as_bitsandbytes, shim_path

__all__ = ["install_as_bitsandbytes", "shim_path"]
