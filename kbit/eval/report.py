"""`report.html`: the table, the plots and what it takes to repeat them, in one file that opens offline."""

from __future__ import annotations

import base64
import datetime
import io
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbit.eval.compare import BASELINE, FormatResult, OutlierResult

# How a report of ours is told from somebody else's file of that name.
_MARKER = '<meta name="generator" content="kbit'
_INK = {"light": "#1c2430", "dark": "#e4e8ee"}
_GRID = {"light": "#d9dee6", "dark": "#39424f"}
# One hue a family, the double-quantized one darker on light and lighter on dark; told apart by marker too.
_STYLES = {
    "bf16": ("#6b7685", "#98a3b3", "D"),
    "int8": ("#0f7b6c", "#3ec7b0", "s"),
    "nf4": ("#1f5fd0", "#6ea8ff", "o"),
    "nf4-plain": ("#7fa6ea", "#3f78d8", "v"),
    "fp4": ("#c2500f", "#ff9c5b", "^"),
    "fp4-plain": ("#e39b6f", "#c4672b", "P"),
}
_DESCRIPTIONS = {
    "bf16": "16 bits, as trained",
    "int8": "row-wise int8, LLM.int8()",
    "nf4": "NF4, block scales in 8 bits",
    "nf4-plain": "NF4, block scales in fp32",
    "fp4": "FP4, block scales in 8 bits",
    "fp4-plain": "FP4, block scales in fp32",
}


@dataclass
class Report:
    """Everything that a report shows.

    title: of the page. rows: one a format. outliers: the outlier experiment, empty where it was not run. settings: name
    and value pairs of how it was measured. machine: what it ran on. versions: of the libraries. command: what made it.
    """

    title: str
    rows: list[FormatResult]
    outliers: list[OutlierResult] = field(default_factory=list)
    outlier_note: str = ""
    prompt: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""


def require() -> None:
    """Raise ModuleNotFoundError now, not after minutes of work, where the report's libraries are not installed."""
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401


def missing() -> str | None:
    """The library of the report that is not installed, None where both are."""
    try:
        require()
    except ModuleNotFoundError as error:
        return error.name
    return None


def check_target(path: str | Path) -> None:
    """ValueError where a file at `path` is not a report of ours, or cannot be written: it is never overwritten."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of the report file")
    parent = next((p for p in path.absolute().parents if p.exists()), None)
    if parent is not None and not parent.is_dir():
        raise ValueError(f"{parent} is a file, so {path} cannot be written")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); write the report elsewhere") from None
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as stream:
            head = stream.read(4096)
        if _MARKER not in head:
            raise ValueError(f"{path} exists and is not a kbit report; move it away or write the report elsewhere")


def write_report(report: Report, path: str | Path) -> None:
    """Render and write a report, replacing an older one. Raises ValueError as `check_target` does."""
    path = Path(path)
    check_target(path)
    text = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def render(report: Report) -> str:
    """The page as one string: styles, plots and data inside, nothing fetched."""
    import jinja2

    import kbit

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kbit.eval", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["size"] = _size
    plots = [("Size against perplexity", size_plot), ("Error by layer", error_plot)]
    figures = []
    for caption, draw in plots:
        images = {theme: draw(report.rows, theme) for theme in _INK}
        if images["light"]:
            figures.append({"caption": caption, **images})
    return environment.get_template("report.html.j2").render(
        report=report,
        version=kbit.__version__,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        figures=figures,
        descriptions=_DESCRIPTIONS,
        baseline=next((row for row in report.rows if row.format == BASELINE), None),
    )


def size_plot(rows: Sequence[FormatResult], theme: str) -> str:
    """Bytes of weights against perplexity, one point a format; "" for no rows."""
    if not rows:
        return ""
    figure, axes = _figure(theme)
    baseline = next((row for row in rows if row.format == BASELINE), None)
    for row in rows:
        color, marker = _style(row.format, theme)
        x = row.bytes / 1e6
        axes.plot(x, row.perplexity, marker, color=color, markersize=9, zorder=3)
    low, high = min(r.perplexity for r in rows), max(r.perplexity for r in rows)
    axes.set_ylim(low - 0.12 * (high - low) - 1e-3 * low, high + 0.2 * (high - low) + 1e-3 * high)
    axes.set_xlim(0, max(r.bytes for r in rows) / 1e6 * 1.18)
    for row, side in zip(rows, _label_sides(rows), strict=True):
        axes.annotate(
            row.format,
            (row.bytes / 1e6, row.perplexity),
            # Above the dashed line of bf16, not through it.
            xytext=(9 if side == "right" else -9, 9 if _on_baseline(row, baseline, high - low) else 0),
            textcoords="offset points",
            ha="left" if side == "right" else "right",
            va="center",
            color=_INK[theme],
        )
    if baseline is not None:
        axes.axhline(
            baseline.perplexity, color=_style(BASELINE, theme)[0], linewidth=1, linestyle=(0, (4, 4)), zorder=1
        )
    axes.set_xlabel("weights, MB")
    axes.set_ylabel("perplexity (lower is better)")
    return _image(figure)


def error_plot(rows: Sequence[FormatResult], theme: str) -> str:
    """Relative squared error of every quantized weight, in the order of the model; "" where none was measured."""
    measured = [row for row in rows if row.layer_errors]
    if not measured:
        return ""
    figure, axes = _figure(theme)
    for row in measured:
        color, marker = _style(row.format, theme)
        values = [max(e.error, 1e-12) for e in row.layer_errors]
        size = 4 if len(values) <= 80 else 2
        axes.plot(
            range(len(values)), values, color=color, marker=marker, markersize=size, linewidth=1.0, label=row.format
        )
    names = [e.name for e in measured[0].layer_errors]
    starts = _layer_starts(names)
    step = max(1, len(starts) // 12)
    if starts:
        axes.set_xticks([position for position, _ in starts[::step]], [label for _, label in starts[::step]])
        for position, _ in starts:
            axes.axvline(position - 0.5, color=_GRID[theme], linewidth=0.8, zorder=0)
        axes.set_xlabel("decoder layer (one point a weight)")
    else:
        axes.set_xlabel("weight")
    axes.set_yscale("log")
    axes.set_ylabel("relative squared error")
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(measured), frameon=False, labelcolor=_INK[theme]
    )
    return _image(figure)


def _on_baseline(row: FormatResult, baseline: FormatResult | None, span: float) -> bool:
    return baseline is not None and abs(row.perplexity - baseline.perplexity) <= 0.05 * span


def _label_sides(rows: Sequence[FormatResult]) -> list[str]:
    """Labels go right of their points, but left where the next point to the right is close and at the same height."""
    span_x = max(r.bytes for r in rows) * 1.18
    span_y = (max(r.perplexity for r in rows) - min(r.perplexity for r in rows)) or 1.0
    sides = []
    for row in rows:
        crowded = any(
            0 < other.bytes - row.bytes < 0.2 * span_x and abs(other.perplexity - row.perplexity) < 0.07 * span_y
            for other in rows
        )
        sides.append("left" if crowded else "right")
    return sides


def _layer_starts(names: Sequence[str]) -> list[tuple[int, str]]:
    """Where each numbered layer begins: [(position, number)]; empty for modules without numbers."""
    starts: list[tuple[int, str]] = []
    for position, name in enumerate(names):
        found = re.search(r"\.(\d+)\.", f".{name}.")
        if found and (not starts or starts[-1][1] != found[1]):
            starts.append((position, found[1]))
    return starts


def _style(name: str, theme: str) -> tuple[str, str]:
    light, dark, marker = _STYLES.get(name, ("#8a5a9e", "#c79be0", "X"))
    return (light if theme == "light" else dark), marker


def _figure(theme: str) -> tuple[Any, Any]:
    """A figure of its own, without pyplot: no global state and no display."""
    from matplotlib.figure import Figure

    ink = _INK[theme]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.grid(True, axis="y", color=_GRID[theme], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=ink, labelsize=9, length=0)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID[theme])
    return figure, axes


def _image(figure: Any) -> str:
    """The figure as a data URI (SVG: sharp at any size)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
