"""`kbit eval`: perplexity of a model on a text, in one format or several."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.app import app
from kbit.cli.common import WEIGHT_FORMATS, parse_formats, print_json

DEFAULT_FORMATS = ["bf16", "int8", "nf4", "fp4"]


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, hub name, or demo for the shipped model.")],
    text: Annotated[Path, typer.Option(help="Text file, UTF-8.")],
    formats: Annotated[
        str | None, typer.Option(help=f"By comma: {', '.join(WEIGHT_FORMATS)}. Default: bf16,int8,nf4,fp4.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens a window moves on; half of the context by default.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a window; the model's by default, 1024 at most.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Score the first so many tokens only.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with table and plots to this file.")] = None,
    prompt: Annotated[str, typer.Option(help="Have each format continue this.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Strided perplexity of MODEL on a text, format by format, each loaded on its own."""
    names = parse_formats(formats) if formats is not None else None
    from kbit.cli import comparison
    from kbit.cli.models import formats_for, load_tokenizer, open_source, pick_device, read_text

    if report is not None:
        from kbit.eval import report as pages

        pages.require()
        pages.check_target(report)
    content = read_text(text)
    place = pick_device(device)
    source = open_source(model)
    names = formats_for(source, names, DEFAULT_FORMATS)
    tokenizer = load_tokenizer(source)

    from kbit.eval import encode

    ids = encode(tokenizer, content)
    if ids.numel() < 2:
        raise ValueError(f"{text} has {ids.numel()} tokens; perplexity needs at least 2")
    rows = comparison.compare(
        source,
        names,
        tokenizer,
        ids,
        prompt=prompt,
        errors=report is not None or as_json,
        device=place,
        context=context,
        stride=stride,
        max_tokens=max_tokens,
    )
    if report is not None:
        page = pages.Report(
            title=f"{_short(source.name)} on {text.name}",
            rows=rows,
            prompt=prompt,
            settings={
                "model": f"{source.name}, {rows[0].bytes / rows[0].ratio / 2e6:,.1f} M parameters",
                "text": str(text),
                "device": place,
                **comparison.settings(rows[0]),
            },
            command=_command(locals()),
            **comparison.provenance(),
        )
        pages.write_report(page, report)
    if as_json:
        data = {**comparison.to_json(model, rows, []), "text": str(text)}
        print_json({**data, "report": str(report)} if report is not None else data)
        return
    first = rows[0]
    windows = f"{first.tokens:,} tokens, context {first.context}, stride {first.stride}"
    comparison.print_rows(rows, f"{_short(source.name)} on {text.name}: {windows}")
    if report is not None:
        print(f"report: {report}")


def _short(name: str) -> str:
    """A hub name as it is, a folder by its last part."""
    return Path(name).name if Path(name).is_dir() else name


def _command(values: dict[str, object]) -> str:
    """The command line that would do it again."""
    words = ["kbit", "eval", str(values["model"]), "--text", str(values["text"])]
    for option in ("formats", "stride", "context", "max_tokens", "report", "prompt"):
        if values[option] not in (None, ""):
            words += [f"--{option.replace('_', '-')}", str(values[option])]
    return shlex.join(words)
