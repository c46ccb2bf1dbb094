"""`kbit bench`: the benchmarks of a checkout, which are not part of an installed kbit."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.app import app


def checkout() -> Path:
    """The folder that this kbit is imported from."""
    return Path(__file__).resolve().parents[2]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def bench(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="For example linear4bit.", metavar="[NAME [OPTIONS]...]", show_default=False)
    ] = "--help",
) -> None:
    """Run a benchmark; needs a checkout of kbit and a CUDA GPU.

    Without NAME: the benchmarks there are, and their options.
    """
    root = checkout()
    script = root / "benchmarks" / "run.py"
    # Another package of that name may lie beside an installed kbit.
    if not script.is_file() or not (root / "pyproject.toml").is_file():
        raise ValueError("benchmarks need a checkout of kbit and a CUDA GPU; this kbit is installed without them")
    import torch

    if not torch.cuda.is_available():
        raise ValueError("benchmarks need a CUDA GPU, and torch sees none (kbit doctor says why)")
    arguments, path = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = ["kbit bench", name, *context.args], [str(root)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        raise typer.Exit(error.code if isinstance(error.code, int) else int(error.code is not None)) from None
    finally:
        sys.argv, sys.path[:] = arguments, path
