"""`kbit demo`: the model that ships with kbit, in every format, in one table and one page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.app import app
from kbit.cli.common import parse_formats, print_json

FORMATS = "bf16,int8,nf4,nf4-plain,fp4"
PROMPT = "This function returns"
NEW_TOKENS = 40
# Tokens of the held-out text that are scored: all of it, or a slice.
QUICK_TOKENS = 4_096
OUTLIER_TOKENS = 8_192
OUTLIER_EXPONENT = 6


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A short slice of the text: about half a minute.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of report.html. [default: kbit-demo]")] = None,
    formats: Annotated[str, typer.Option(help="Formats to compare, by comma.")] = FORMATS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Load the shipped model in every format, compare size, quality and speed, and write report.html.

    Without matplotlib and jinja2 (the extra `report`) everything but the page.
    """
    names = parse_formats(formats)
    from kbit.eval import report as pages

    missing = pages.missing()
    if missing and output is not None:
        pages.require()
    target = None if missing else (output or Path("kbit-demo")) / "report.html"
    if target is not None:
        pages.check_target(target)

    from kbit.assets import demo_model, heldout_text
    from kbit.cli import comparison
    from kbit.cli.models import load_tokenizer, open_source, read_text
    from kbit.eval import encode

    started = time.perf_counter()
    source = open_source(demo_model())  # and not a folder here that is called demo
    tokenizer = load_tokenizer(source)
    ids = encode(tokenizer, read_text(heldout_text()))
    limit = QUICK_TOKENS if quick else None
    rows = comparison.compare(source, names, tokenizer, ids, prompt=PROMPT, new_tokens=NEW_TOKENS, max_tokens=limit)
    outliers = comparison.outliers(source, ids, OUTLIER_EXPONENT, max_tokens=limit or OUTLIER_TOKENS)

    parameters = rows[0].bytes / rows[0].ratio / 2e6
    page = pages.Report(
        title="One language model in 16, 8 and 4 bits",
        rows=rows,
        outliers=outliers,
        outlier_note=comparison.OUTLIER_NOTE.format(tokens=outliers[0].tokens, scale=2**OUTLIER_EXPONENT),
        prompt=PROMPT,
        settings={
            "model": f"the model that ships with kbit: Llama architecture, {parameters:.1f} M parameters",
            "text": "held-out text that ships with kbit; the model has not seen it",
            **comparison.settings(rows[0]),
        },
        command="kbit demo" + (" --quick" if quick else "") + ("" if formats == FORMATS else f" --formats {formats}"),
        **comparison.provenance(),
    )
    if target is not None:
        pages.write_report(page, target)
    if as_json:
        print_json({**comparison.to_json("demo", rows, outliers), "report": target and str(target)})
        return
    comparison.print_rows(
        rows, f"the shipped model ({parameters:.1f} M parameters) on {rows[0].tokens:,} held-out tokens"
    )
    comparison.print_outliers(outliers)
    report = target or f"none, since {missing} is not installed: pip install 'kbit[report]' for the page with plots"
    print(f"report: {report}  ({time.perf_counter() - started:.0f} s)")
