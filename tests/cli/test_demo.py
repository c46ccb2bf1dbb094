"""`kbit demo` on the model that ships: the numbers it promises, the page it writes, what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.tiny import kbit, sentence


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The JSON of one quick run, and its page."""
    import contextlib
    import io
    import json

    from kbit.cli.app import run

    folder = tmp_path_factory.mktemp("demo") / "out"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["demo", "--quick", "--json", "--output", str(folder)]) == 0
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    return json.loads(out.getvalue()), (folder / "report.html").read_text(encoding="utf-8")


def test_every_format_is_there(demo) -> None:
    rows = {row["format"]: row for row in demo[0]["rows"]}
    assert list(rows) == ["bf16", "int8", "nf4", "nf4-plain", "fp4"]
    for row in rows.values():
        assert row["tokens"] == 4096
        assert row["tokens_per_second"] > 0 and row["generate_tokens_per_second"] > 0
        assert len(row["text"].split()) > 10, "a line of generated text"
        assert len(row["layer_errors"]) == (0 if row["format"] == "bf16" else 56)
    assert rows["nf4"]["bytes"] < rows["nf4-plain"]["bytes"] < rows["int8"]["bytes"] < rows["bf16"]["bytes"]


def test_quality_separates_the_formats(demo) -> None:
    rows = {row["format"]: row for row in demo[0]["rows"]}
    assert rows["int8"]["perplexity_ratio"] == pytest.approx(1.0, abs=0.005)
    assert 1.0 < rows["nf4"]["perplexity_ratio"] <= 1.06
    assert rows["fp4"]["perplexity"] > rows["nf4"]["perplexity"]
    assert rows["fp4"]["mean_error"] > 1.3 * rows["nf4"]["mean_error"] > 50 * rows["int8"]["mean_error"]


def test_sizes_of_the_quantized_layers(demo) -> None:
    rows = {row["format"]: row for row in demo[0]["rows"]}
    assert rows["int8"]["quantized_ratio"] <= 0.52
    assert rows["nf4"]["quantized_ratio"] <= 0.265
    assert rows["fp4"]["quantized_ratio"] == rows["nf4"]["quantized_ratio"] < rows["nf4-plain"]["quantized_ratio"]


def test_outliers_hurt_plain_int8_alone(demo) -> None:
    bf16, plain, split = demo[0]["outliers"]
    assert bf16["perplexity"] == pytest.approx(demo[0]["rows"][0]["perplexity"], rel=1e-3)  # the function is the same
    assert plain["ratio"] > 1.05
    assert split["ratio"] < 1.01
    assert plain["ratio"] - 1 > 10 * (split["ratio"] - 1)


def test_page(demo) -> None:
    data, page = demo
    for row in data["rows"]:
        assert f"{row['perplexity']:.3f}" in page
        assert f"{row['perplexity_ratio']:.4f}×" in page
    for row in data["outliers"]:
        assert row["name"] in page and f"{row['ratio']:.4f}×" in page
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "kbit demo --quick" in page
    assert "http://" not in page and "https://" not in page


def test_a_file_of_somebody_else_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    page.write_text("my own")
    assert "is not a kbit report" in sentence(kbit(capsys, "demo", "--quick", "--output", tmp_path))
    assert page.read_text() == "my own"


def test_a_folder_called_demo_is_a_model_for_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kbit.assets import demo_model
    from kbit.cli import comparison
    from kbit.cli.models import open_source

    def compare(source: object, *args: object, **kwargs: object) -> None:
        raise ValueError(f"measuring {source.folder}")  # type: ignore[attr-defined]

    monkeypatch.setattr(comparison, "compare", compare)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("a file is no model")
    assert str(open_source("demo").folder) == str(demo_model())
    (tmp_path / "demo").unlink()
    (tmp_path / "demo").mkdir()
    with pytest.raises(ValueError, match="demo is not a model folder"):
        open_source("demo")
    assert str(demo_model()) in sentence(kbit(capsys, "demo", "--output", tmp_path / "out"))


def test_unknown_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("demo", "--formats", "bf16,nf5", "--output", tmp_path / "out")
    assert "unknown format 'nf5'" in sentence(kbit(capsys, *arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "extra"), [("transformers", "hf"), ("matplotlib", "report"), ("jinja2", "report")])
def test_missing_extra_is_said_at_once(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Missing(package), *sys.meta_path])
    said = sentence(kbit(capsys, "demo", "--output", tmp_path / "out"))
    assert package in said and f"pip install 'kbit[{extra}]'" in said
    assert not (tmp_path / "out").exists()


def test_without_the_report_extra_everything_but_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kbit.cli import demo as command

    for name in [name for name in sys.modules if name.split(".")[0] == "jinja2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Missing("jinja2"), *sys.meta_path])
    monkeypatch.setattr(command, "QUICK_TOKENS", 512)
    monkeypatch.chdir(tmp_path)
    code, out, _ = kbit(capsys, "demo", "--quick", "--formats", "nf4")
    assert code == 0 and "nf4" in out and "threshold 6" in out
    assert "report: none, since jinja2 is not installed: pip install 'kbit[report]'" in out
    assert not list(tmp_path.iterdir())


class _Missing:
    """A finder that makes a package look as if it were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
