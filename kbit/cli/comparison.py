"""The run behind `kbit demo` and `kbit eval`: every format measured, the table printed, the report written."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kbit.cli.common import format_bytes, print_table
from kbit.cli.models import Source, line_writer, load_model, machine_facts, reference_reader

if TYPE_CHECKING:
    from kbit.eval.compare import FormatResult, OutlierResult

OUTLIER_NOTE = (
    "Large models grow a few hidden features that are tens of times larger than the rest; small ones do not. Here "
    "one channel of every norm's output was multiplied by {scale} and the columns of the weights that read it divided "
    "by it, which changes nothing that the model computes (powers of two are exact). Without a threshold the "
    "large feature takes the int8 range from all others; with threshold 6 it is multiplied in 16 bits. "
    "Measured on the first {tokens:,} tokens of the text."
)


@contextmanager
def token_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, fed with (done, total); nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def compare(
    source: Source,
    formats: list[str],
    tokenizer: Any,
    ids: Any,
    *,
    prompt: str,
    new_tokens: int = 40,
    errors: bool = True,
    device: str = "cpu",
    **perplexity_args: Any,
) -> list[FormatResult]:
    """Measure MODEL in every format, one model in memory at a time."""
    from kbit.eval.compare import measure, relate_to_baseline

    reader = read = None
    if errors and source.saved_format is None:
        reader, read = reference_reader(source)
    rows = []
    try:
        for name in formats:
            with token_bar(f"{name:<9}") as progress:
                model = load_model(source, name, device)
                rows.append(
                    measure(
                        model,
                        ids,
                        name,
                        generate=line_writer(tokenizer, prompt, new_tokens) if prompt else None,
                        reference=read if name != "bf16" else None,
                        progress=progress,
                        **perplexity_args,
                    )
                )
                del model
                gc.collect()
    finally:
        if reader is not None:
            reader.close()
    relate_to_baseline(rows)
    return rows


def outliers(source: Source, ids: Any, exponent: int, **perplexity_args: Any) -> list[OutlierResult]:
    """The outlier experiment on MODEL, with a bar for its three cases."""
    from kbit.eval.compare import OUTLIER_CASES, compare_outliers

    with token_bar("outliers ") as progress:
        done = 0

        def step(name: str) -> None:
            nonlocal done
            progress(done, len(OUTLIER_CASES))
            done += 1

        return compare_outliers(
            lambda: load_model(source, "bf16"), ids, step=step, exponent=exponent, **perplexity_args
        )


def print_rows(rows: list[FormatResult], title: str, text_width: int = 60) -> None:
    """The table on stdout."""
    related = any(row.perplexity_ratio is not None for row in rows)
    written = any(row.generate_tokens_per_second is not None for row in rows)
    columns = ["format", ">weights", ">to bf16", ">layers to bf16", ">perplexity"]
    columns += [">to bf16"] if related else []
    columns += [">read tok/s"] + ([">write tok/s", "writes"] if written else [])
    table = []
    for row in rows:
        cells = [row.format, format_bytes(row.bytes), f"{row.ratio:.3f}x", f"{row.quantized_ratio:.3f}x"]
        cells.append(f"{row.perplexity:.3f}")
        if related:
            cells.append("" if row.perplexity_ratio is None else f"{row.perplexity_ratio:.4f}x")
        cells.append(f"{row.tokens_per_second:,.0f}")
        if written:
            speed = row.generate_tokens_per_second
            text = row.text if len(row.text) <= text_width else row.text[: text_width - 1].rstrip() + "…"
            cells += ["" if speed is None else f"{speed:,.1f}", text]
        table.append(cells)
    print_table(columns, table, title=title)


def print_outliers(rows: list[OutlierResult]) -> None:
    """The outlier table on stdout."""
    table = [[row.name, f"{row.perplexity:.3f}", f"{row.ratio:.4f}x"] for row in rows]
    print_table([f"with outlier features, {rows[0].tokens:,} tokens", ">perplexity", ">to bf16"], table)


def settings(row: FormatResult) -> dict[str, str]:
    """How the perplexity was measured, for the report."""
    return {
        "tokens scored": f"{row.tokens:,}",
        "windows": f"{row.context} tokens, moved by {row.stride}",
        "activations": "bf16",
    }


def provenance() -> dict[str, Any]:
    """Machine and versions, for the report."""
    machine, versions = machine_facts()
    return {"machine": machine, "versions": versions}


def to_json(model: str, rows: list[FormatResult], outliers: list[OutlierResult]) -> dict[str, Any]:
    """What `--json` prints."""
    machine, versions = machine_facts()
    data: dict[str, Any] = {
        "model": model,
        "rows": [row.to_json() for row in rows],
        "machine": machine,
        "versions": versions,
    }
    if outliers:
        data["outliers"] = [row.to_json() for row in outliers]
    return data
