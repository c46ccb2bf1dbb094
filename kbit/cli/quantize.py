"""`kbit quantize`: a quantized copy of a model on disk, made tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.app import app
from kbit.cli.common import format_bytes, parse_memory, print_json

FORMATS = ("nf4", "nf4-plain", "fp4", "fp4-plain", "int8")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Model folder, hub name, or demo for the shipped model.")],
    out: Annotated[Path, typer.Argument(help="The new model folder.")],
    format_name: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = "nf4",
    layout: Annotated[
        str, typer.Option(help="native, or bitsandbytes for other tools that read its checkpoints.")
    ] = "native",
    block_size: Annotated[int, typer.Option(help="Elements that share a scale (4 bits).")] = 64,
    skip: Annotated[
        list[str] | None, typer.Option(help="Module name or pattern to leave as it is; may be repeated.")
    ] = None,
    skip_nothing: Annotated[bool, typer.Option("--skip-nothing", help="Quantize the output head too.")] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Quantize embeddings too.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, for example 2GB.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a model folder already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write MODEL to OUT with its weights quantized, in the memory of one tensor.

    from_pretrained(OUT) loads it.
    """
    from kbit.checkpoint.native import LAYOUTS
    from kbit.config import KbitConfig

    if format_name not in FORMATS:
        raise ValueError(f"unknown format {format_name!r}; known: {', '.join(FORMATS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if skip and skip_nothing:
        raise ValueError("--skip and --skip-nothing contradict each other; give one of them")
    config = KbitConfig.from_format(
        format_name,
        block_size=block_size,
        skip_modules=[] if skip_nothing else list(skip) if skip else None,
        quantize_embeddings=embeddings,
    )
    shard = parse_memory(max_shard_size)

    import transformers  # noqa: F401  # a missing extra is said before anything else

    from kbit.checkpoint import quantize_checkpoint
    from kbit.checkpoint.folder import check_out
    from kbit.cli.comparison import token_bar
    from kbit.cli.models import open_source

    check_out(out, force)
    source = open_source(model, saved_formats=False)
    with token_bar(f"{format_name:<9}") as progress:
        summary = quantize_checkpoint(
            source.folder, out, config, layout=layout, max_shard_size=shard, force=force, progress=progress
        )
    if as_json:
        print_json({"model": model, **vars(summary)})
        return
    print(
        f"{out}: {summary.quantized} weights in {summary.format}, {summary.copied} tensors as they were; "
        f"{format_bytes(summary.source_bytes)} -> {format_bytes(summary.nbytes)} in {summary.seconds:.1f} s"
    )
