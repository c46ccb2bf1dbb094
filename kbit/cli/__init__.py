"""The `kbit` command. Parsing and printing only; what it says is computed elsewhere in the package."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `kbit` script and of `python -m kbit`."""
    from kbit.cli.app import leave_on_sigterm, run

    if sys.argv[1:2] != ["run"]:  # signals are then the script's
        leave_on_sigterm()
    sys.exit(run(sys.argv[1:]))
