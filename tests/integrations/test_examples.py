"""examples/native: every script runs as it stands, on the model that ships, and does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the peft extra is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")

from tests.integrations.dropin.harness import ROOT, run_file  # noqa: E402

pytestmark = pytest.mark.transformers
FOLDER = ROOT / "examples" / "native"


def test_load(tmp_path: Path) -> None:
    output = run_file(FOLDER / "load.py", shim=False, cwd=tmp_path)
    plain, small = (float(figure) for figure in re.findall(r"([\d.]+) MB[;,]", output))
    assert small < plain
    assert "equal to the bit: True" in output
    assert not list(tmp_path.iterdir())


def test_finetune_then_merge(tmp_path: Path) -> None:
    output = run_file(FOLDER / "finetune.py", "adapter", 6, shim=False, cwd=tmp_path)
    before, after = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", output).groups()  # type: ignore[union-attr]
    assert float(after) < float(before)
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files

    output = run_file(FOLDER / "merge.py", "adapter", "out", shim=False, cwd=tmp_path)
    sizes = [float(figure) for figure in re.findall(r"([\d.]+) MB, logits", output)]
    assert len(sizes) == 2 and sizes[1] < sizes[0]
    for name in ("merged", "merged-nf4"):
        assert (tmp_path / "out" / name / "model.safetensors").is_file()
        assert re.search(rf"^{name} .*The package manager", output, re.MULTILINE)


def test_no_example_is_left_out() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {"load.py", "finetune.py", "merge.py"}
