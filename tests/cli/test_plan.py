"""`kbit plan`: the table, the JSON, the advice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kbit


def test_table_lists_every_format(kbit_cli) -> None:  # type: ignore[no-untyped-def]
    result = kbit_cli("plan", "--params", "7B", "--memory", "12GB")
    assert result.code == 0 and result.err == ""
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    for name in ("bf16", "int8", "nf4-plain", "nf4", "fp4"):
        assert rows[name].split()[-2] in ("yes", "no")
    assert "no" in rows["bf16"].split() and "yes" in rows["nf4"].split()
    assert "14.0 GB" in rows["bf16"]
    for header in ("weights", "KV cache", "activations", "total", "fits"):
        assert header in result.out
    assert "recommended: int8" in result.out
    assert "KbitConfig(bits=8)" in result.out


def test_columns_of_training(kbit_cli) -> None:  # type: ignore[no-untyped-def]
    out = kbit_cli("plan", "--params", "7B", "--memory", "12GB", "--train", "qlora").out
    for header in ("adapter", "gradients", "optimizer"):
        assert header in out
    assert "KV cache" not in out
    assert 'target_modules="all-linear"' in out


def test_lines_are_never_cut(kbit_cli) -> None:  # type: ignore[no-untyped-def]
    out = kbit_cli(
        "plan", "--params", "7B", "--memory", "12GB", "--train", "full", "--optimizer", "paged-adamw8bit"
    ).out
    assert "…" not in out
    header = next(line for line in out.splitlines() if line.strip().startswith("format"))
    assert "max context" in header and "(paged)" in header


@pytest.mark.parametrize("label", ["bf16", "int8", "nf4", "nf4-plain", "fp4"])
def test_json_weights_are_those_of_the_loaded_model(kbit_cli, tiny_llama: Path, label: str) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    data = kbit_cli("plan", tiny_llama, "--memory", "1GB", "--json").json()
    row = next(row for row in data["formats"] if row["format"] == label)
    quantization = {} if label == "bf16" else {"quantization_config": kbit.KbitConfig.from_format(label)}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16, **quantization)
    assert row["memory"]["weights"] == row["weights"]["total"] == kbit.model_memory(model)


def test_json_carries_what_was_asked(kbit_cli, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["--train", "qlora", "--optimizer", "paged_adamw_8bit", "--context", "100", "--batch", "3"]
    data = kbit_cli("plan", tiny_llama, "--memory", "1.5GiB", *arguments, "--json").json()
    settings = data["settings"]
    assert settings["memory"] == 3 * 2**29
    assert (settings["train"], settings["context"], settings["batch"]) == ("qlora", 100, 3)
    assert settings["optimizer"] == "paged-adamw8bit"
    assert data["shape"]["attention"] == [{"width": 128, "window": None, "cross": False, "layers": 2}]
    assert data["recommendation"]["format"] == "nf4"


def test_default_context_is_the_models(kbit_cli, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    assert kbit_cli("plan", tiny_llama, "--memory", "1GB", "--json").json()["settings"]["context"] == 256
    longer = kbit_cli("plan", tiny_llama, "--memory", "1GB", "--context", "1000")
    assert "made for 256 tokens" in longer.out


def test_without_memory_it_is_this_machines(kbit_cli, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    from kbit.plan.machine import best_device

    data = kbit_cli("plan", tiny_llama, "--json").json()
    assert data["settings"]["memory"] == best_device().memory


def test_formats_can_be_chosen(kbit_cli) -> None:  # type: ignore[no-untyped-def]
    data = kbit_cli("plan", "--params", "1B", "--memory", "8GB", "--formats", "nf4,fp4-plain", "--json").json()
    assert [row["format"] for row in data["formats"]] == ["nf4", "fp4-plain"]


def test_only_config_json_is_needed(kbit_cli, tiny_llama: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    assert kbit_cli("plan", tmp_path, "--memory", "1GB").code == 0


def test_the_shipped_model_has_a_name(kbit_cli) -> None:  # type: ignore[no-untyped-def]
    from kbit.assets import demo_model

    if not (Path(demo_model()) / "config.json").is_file():
        pytest.fail("the model that ships with kbit is not there")
    assert kbit_cli("plan", "demo", "--memory", "1GB").code == 0


def test_params_needs_no_transformers() -> None:
    code = (
        "import sys; from kbit.cli.app import run; code = run(['plan', '--params', '7B', '--memory', '12GB']);"
        "assert 'transformers' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
