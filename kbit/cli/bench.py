"""`kbit bench`: the benchmarks of a checkout, which are not part of an installed kbit, and tuning, which is."""

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
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure the fastest tiles of every Triton kernel on this GPU and keep them.")
    ] = False,
    operations: Annotated[
        str | None, typer.Option(help="With --tune: only these, for example linear_4bit,experts_4bit.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="With --tune: the file to write; by default one that kbit finds again by itself."),
    ] = None,
) -> None:
    """Run a benchmark; needs a checkout of kbit and a CUDA GPU. With --tune: tune the Triton kernels for this GPU.

    Without NAME: the benchmarks there are, and their options.
    """
    if tune:
        return _tune(operations, output)
    if operations is not None or output is not None:
        raise ValueError("--operations and --output belong to --tune; a benchmark's own options follow its name")
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


def _tune(operations: str | None, output: Path | None) -> None:
    """Tune on the current GPU, operation by operation; each one's tiles are kept once it is done."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("tuning needs a GPU, and torch sees none (kbit doctor says why)")
    from kbit.ops import triton

    if reason := triton.why_not():
        raise ValueError(reason)
    from kbit.kernels.triton import tiles, tune

    device = torch.device("cuda", torch.cuda.current_device())
    path = output or tiles.user_folder() / tiles.file_name(tiles.gpu_of(device))
    for operation in operations.split(",") if operations else tune.OPERATIONS:
        done = []
        for measured in tune.tune(device, [operation]):
            done.append(measured)
            typer.echo(
                f"{operation:24} up to {measured.max_m:3} tokens  {measured.seconds * 1e6:8.1f} us  "
                f"{measured.before / measured.seconds:5.2f}x  {measured.rule}"
            )
        tune.write(done, path)
    typer.echo(str(path))
