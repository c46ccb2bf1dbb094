"""Registration: whichever of kbit and transformers comes first, and what happens where kbit was never imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import kbit
from tests.integrations import tiny_models as tiny

CHECK = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "kbit" in AUTO_QUANTIZATION_CONFIG_MAPPING and "kbit" in AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["kbit"].__name__.startswith("KbitQuantizerV")
print("registered")
"""
ONE_WATCHER = """
import sys
watchers = [f for f in sys.meta_path if type(f).__name__ == "ImportWatcher"]
assert sum(f.name == "transformers.quantizers.auto" for f in watchers) == 1
"""
ORDERS = {
    "kbit first": "import kbit, sys; assert 'transformers' not in sys.modules\nimport transformers" + CHECK,
    "transformers first": "import transformers.quantizers\nimport kbit" + CHECK,
    "lazily": "import transformers\nimport kbit, sys\nassert 'transformers.quantizers.auto' not in sys.modules\n"
    "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained" + CHECK,
    "twice": "import kbit\nfrom kbit.integrations.arm import arm\narm(); arm()\nimport transformers\narm()"
    + CHECK
    + ONE_WATCHER,
    "reload": "import kbit, importlib, transformers.quantizers as q\nimportlib.reload(q.auto)"
    + CHECK
    + "importlib.reload(q)"
    + CHECK,
    "reload of arm": "import kbit, importlib, kbit.integrations.arm as arm\nimportlib.reload(arm).arm()"
    + CHECK
    + ONE_WATCHER,
    "from threads": "import kbit, threading\n"
    "from concurrent.futures import ThreadPoolExecutor\n"
    "def go(i):\n"
    "    from kbit.integrations.arm import arm\n"
    "    arm() if i % 2 else __import__('transformers.quantizers')\n"
    "list(ThreadPoolExecutor(8).map(go, range(16)))" + CHECK,
    "source is still found": "import kbit, inspect, transformers.quantizers.auto as auto\n"
    "assert 'AutoHfQuantizer' in inspect.getsource(auto) and auto.__spec__.loader.get_code(auto.__name__)" + CHECK,
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_registration(order: str) -> None:
    done = tiny.run_python(ORDERS[order])
    assert done.returncode == 0 and "registered" in done.stdout, done.stderr
    assert "kbit could not plug" not in done.stderr


def test_import_kbit_does_not_import_transformers() -> None:
    done = tiny.run_python("import kbit, sys\nassert not any(m.split('.')[0] == 'transformers' for m in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_other_imports_are_left_alone() -> None:
    code = (
        "import kbit, sys, importlib.util\n"
        "watchers = [f for f in sys.meta_path if type(f).__name__ == 'ImportWatcher']\n"
        "assert watchers\n"
        "for name in ('json', 'transformers', 'transformers.quantizers', 'no_such_module'):\n"
        "    assert all(f.find_spec(name) is None for f in watchers)\n"
        "assert importlib.util.find_spec('no_such_module') is None\n"
    )
    done = tiny.run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_failing_registration_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.quantizers.auto  # noqa: F401  (arm() then registers at once)

    import kbit.integrations.transformers as integration
    from kbit.integrations.arm import arm

    def fail() -> None:
        raise RuntimeError("a version from the future")

    monkeypatch.setattr(integration, "register", fail)
    with pytest.warns(UserWarning, match="a version from the future"):
        arm()


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"bits": 4, "skip_modules": []}])
def test_a_checkpoint_fails_loudly_where_nobody_imported_kbit(options: dict, tmp_path: Path) -> None:
    """transformers only warns of an unknown quant_method; the shapes of the codes have to stop it."""
    path = tiny.save(tiny.llama(), tmp_path / "source", torch.bfloat16)
    tiny.load(path, kbit.KbitConfig(**options)).save_pretrained(tmp_path / "q")
    code = (
        "import sys, transformers\n"
        "assert 'kbit' not in sys.modules\n"
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print('loaded')\n"
    )
    done = tiny.run_python(code, str(tmp_path / "q"))
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "Unknown quantization type, got kbit" in done.stderr
    assert "RuntimeError" in done.stderr and "size" in done.stderr
    assert sys.modules["kbit"] is kbit  # here, of course, it loads
    assert tiny.quantized(tiny.load(tmp_path / "q"))
