"""The report is one file that needs nothing else, and it never replaces a file that is not a report."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kbit.eval.compare import FormatResult, OutlierResult, relate_to_baseline
from kbit.eval.layer_error import LayerError
from kbit.eval.report import Report, check_target, render, write_report


def row(name: str, size: int, perplexity: float, error: float = 0.0, text: str = "a line") -> FormatResult:
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("q_proj", "up_proj")]
    return FormatResult(
        format=name,
        bytes=size,
        ratio=size / 15_000_000,
        quantized_bytes=size // 2,
        quantized_ratio=0.265,
        perplexity=perplexity,
        tokens=1000,
        context=512,
        stride=256,
        tokens_per_second=1234.5,
        generate_tokens_per_second=17.25,
        text=text,
        layer_errors=[LayerError(n, error, 64) for n in names] if error else [],
    )


@pytest.fixture
def report() -> Report:
    rows = [
        row("bf16", 15_000_000, 20.0),
        row("int8", 9_000_000, 20.05, 6e-5),
        row("nf4", 6_000_000, 21.0, 8e-3, text="<script>alert('x')</script> & more"),
    ]
    relate_to_baseline(rows)
    return Report(
        title="A model & its formats",
        rows=rows,
        outliers=[OutlierResult("bf16", 20.0, 1.0, 500), OutlierResult("int8, no threshold", 26.0, 1.3, 500)],
        outlier_note="how it was done",
        prompt="Once",
        settings={"windows": "512 tokens"},
        machine={"cpu": "a processor"},
        versions={"torch": "2.13.0"},
        command="kbit eval x --text y",
    )


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "source", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_everything_is_inside(report: Report) -> None:
    page = Page(render(report))
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "srcset"):
            if attributes.get(name):
                assert attributes[name].startswith("data:image/svg+xml;base64,")
    images = [a["src"] for tag, a in page.tags if tag == "img"] + [
        a["srcset"] for tag, a in page.tags if tag == "source"
    ]
    assert len(images) == 4  # two plots, light and dark
    for image in images:
        assert ET.fromstring(base64.b64decode(image.partition(",")[2])).tag.endswith("svg")
    style = " ".join(page.text)
    assert "url(" not in style and "@import" not in style


def test_numbers_and_texts_are_shown(report: Report) -> None:
    text = " ".join(" ".join(Page(render(report)).text).split())
    for piece in (
        "6.00 MB",
        "0.400×",
        "21.000",
        "1.0500×",
        "8.0e-03",
        "1,234",
        "17.2",
        "26.000",
        "1.3000×",
        "512 tokens",
    ):
        assert piece in text, piece
    for piece in ("A model & its formats", "kbit eval x --text y", "2.13.0", "a processor", "how it was done", "Once"):
        assert piece in text, piece
    # What a model writes is text, never markup.
    assert "<script>alert('x')</script> & more" in text


def test_without_baseline_errors_and_outliers(report: Report) -> None:
    report.rows = [row("fp4", 5_000_000, 30.0)]
    report.outliers = []
    html = render(report)
    assert "Error by layer" not in html and "Outlier features" not in html
    assert "Size against perplexity" in html


def test_own_report_is_replaced_but_nothing_else(report: Report, tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    write_report(report, target)
    first = target.read_text(encoding="utf-8")
    report.title = "Second"
    write_report(report, target)
    assert "Second" in target.read_text(encoding="utf-8") != first
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]

    target.write_text("<html>my own notes</html>")
    for call in (lambda: write_report(report, target), lambda: check_target(target)):
        with pytest.raises(ValueError, match="not a kbit report"):
            call()
    assert target.read_text() == "<html>my own notes</html>"
    with pytest.raises(ValueError, match="is a folder"):
        check_target(tmp_path)
    with pytest.raises(ValueError, match="is a file, so"):
        check_target(target / "below" / "report.html")


def test_dark_and_light(report: Report) -> None:
    html = render(report)
    assert len(re.findall(r"prefers-color-scheme: dark", html)) >= 3
    assert '<meta name="color-scheme" content="light dark">' in html
