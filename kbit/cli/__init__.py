"""The `kbit` command. Parsing and printing only; what it says is computed elsewhere in the package."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `kbit` script and of `python -m kbit`."""
    from kbit.cli.app import run

    sys.exit(run(sys.argv[1:]))
