"""Same seed, same data: the loss curves of native kbit, the drop-in and bitsandbytes agree within 1% over 50 steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.integrations.dropin.harness import llama, run_file

SCRIPT = Path(__file__).parent / "dropin" / "curve.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curve")
    llama(initializer_range=0.1).save_pretrained(folder)  # a frozen head that can say something
    return folder


@pytest.fixture(scope="module")
def dropin(model: Path) -> list[float]:
    return losses(model, "bitsandbytes", shim=True)


def losses(model: Path, way: str, shim: bool) -> list[float]:
    return json.loads(run_file(SCRIPT, model, way, shim=shim).splitlines()[-1])


def assert_agree(a: list[float], b: list[float]) -> None:
    assert len(a) == len(b) == 50
    worst = max(abs(x - y) / y for x, y in zip(a, b, strict=True))
    assert worst < 0.01, f"the curves are up to {worst:.2%} apart"


def test_the_drop_in_learns(dropin: list[float]) -> None:
    assert dropin[-1] < 0.8 * dropin[0]


def test_native_and_drop_in_agree(model: Path, dropin: list[float]) -> None:
    assert_agree(losses(model, "native", shim=False), dropin)


def test_bitsandbytes_and_drop_in_agree(model: Path, dropin: list[float]) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    assert_agree(losses(model, "bitsandbytes", shim=False), dropin)
