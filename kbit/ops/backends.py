"""Which backends serve this machine, and why the others do not: what `kbit doctor` prints."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Backend:
    """One family of kernels: its name, whether it is in use here, and the reason in one line."""

    name: str
    active: bool
    reason: str


def backends() -> list[Backend]:
    """Every backend, in the order in which operators prefer them; the last one always works."""
    return [Backend("reference", True, "plain torch; serves every device")]
