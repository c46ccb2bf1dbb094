"""transformers, PEFT, Trainer and accelerate with kbit as bitsandbytes: flows of dropin/stack.py, in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.dropin.harness import ROOT, environment, run_file, save_llama

pytestmark = pytest.mark.transformers

SCRIPT = Path(__file__).parent / "dropin" / "stack.py"
FLOWS = [
    "detection",
    "architectures",
    "keyword_of_transformers_4",
    "dequantize",
    "damaged_checkpoints",
    "peft",
    "trainer",
    "trainer_resumes_exactly",
    "optimizer_names",
    "accelerate",
    "late_install",
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each flow printed, by name: every one of them runs in the same process, as in a notebook."""
    folder = tmp_path_factory.mktemp("stack")
    (folder / "scratch").mkdir()
    output = run_file(SCRIPT, save_llama(folder / "model"), folder / "scratch")
    found = {}
    for part in output.replace("FAILED ", "\0FAILED ").replace("PASSED ", "\0PASSED ").split("\0"):
        if part.startswith(("FAILED ", "PASSED ")):
            found[part.split()[1]] = part
    return found


@pytest.mark.parametrize("flow", FLOWS)
def test_flow(outcome: dict[str, str], flow: str) -> None:
    assert outcome.get(flow, "did not run").startswith("PASSED"), outcome.get(flow)


def python(code: str, shim: bool = False, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {**environment(shim), **extra}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


# A folder that holds something which calls itself bitsandbytes.
FAKE = "__version__ = '0.49.0'\n"


def fake(tmp_path: Path) -> str:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(FAKE)
    return f"{ROOT}:{tmp_path}"


def test_a_real_bitsandbytes_wins_and_the_call_says_so(tmp_path: Path) -> None:
    code = (
        "from kbit.integrations.bitsandbytes import install_as_bitsandbytes\n"
        "try:\n    install_as_bitsandbytes()\n"
        "except RuntimeError as error:\n    print(error)\n"
        "import bitsandbytes\nprint(bitsandbytes.__version__)\n"
    )
    done = python(code, PYTHONPATH=fake(tmp_path))
    message, version = done.stdout.splitlines()
    assert "is installed, and it wins over kbit" in message and "override=True" in message and "kbit run" in message
    assert version == "0.49.0"


def test_override_takes_precedence(tmp_path: Path) -> None:
    code = (
        "from kbit.integrations.bitsandbytes import install_as_bitsandbytes\n"
        "install_as_bitsandbytes(override=True); install_as_bitsandbytes(override=True)\n"
        "import bitsandbytes, importlib.metadata, sys\n"
        "print(bitsandbytes.__version__, importlib.metadata.version('bitsandbytes'))\n"
    )
    assert python(code, PYTHONPATH=fake(tmp_path)).stdout.split() == ["0.50.2+kbit"] * 2


def test_one_that_is_imported_already_cannot_be_replaced(tmp_path: Path) -> None:
    code = (
        "import bitsandbytes\nfrom kbit.integrations.bitsandbytes import install_as_bitsandbytes\n"
        "try:\n    install_as_bitsandbytes(override=True)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    assert "is imported already and stays in use" in python(code, PYTHONPATH=fake(tmp_path)).stdout


def test_every_name_of_bitsandbytes_is_there_or_says_what_to_use() -> None:
    """Every public name of bitsandbytes 0.50.2's modules that users import from."""
    pytest.importorskip("bitsandbytes")
    listing = (
        "import importlib, json\n"
        "names = {}\n"
        "for m in ('', '.nn', '.nn.modules', '.nn.parametrize', '.functional', '.optim', '.utils',\n"
        "          '.optim.optimizer', '.autograd._functions', '.optim.adamw', '.optim.lars', '.optim.ademamix'):\n"
        "    module = importlib.import_module('bitsandbytes' + m)\n"
        "    own = lambda v: str(getattr(v, '__module__', ''))\n"
        "    names[m] = [n for n, v in vars(module).items() if len(n) > 1 and n[0] != '_' and\n"
        "                (own(v) == module.__name__ or hasattr(module, '__path__') and own(v).startswith('bitsand'))]\n"
        "print(json.dumps(names))\n"
    )
    real = python(listing)
    assert real.returncode == 0, real.stderr
    check = (
        "import importlib, json, sys\n"
        "missing = []\n"
        f"for m, names in json.loads({real.stdout.strip()!r}).items():\n"
        "    module = importlib.import_module('bitsandbytes' + m)\n"
        "    for n in names:\n"
        "        try:\n            getattr(module, n)\n"
        "        except AttributeError as error:\n"
        "            if 'does not exist in kbit' not in str(error): missing.append(m + '.' + n)\n"
        "        try:\n            exec(f'from bitsandbytes{m} import {n}')\n"
        "        except ImportError as error:\n"
        "            if 'does not exist in kbit' not in str(error): missing.append('import ' + m + '.' + n)\n"
        "print(missing)\n"
    )
    done = python(check, shim=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_importing_the_package_is_light() -> None:
    code = (
        "import bitsandbytes, sys, torch\n"
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'transformers', 'accelerate', 'peft', 'triton'}))\n"
        "print(torch.cuda.is_initialized())\n"
    )
    assert python(code, shim=True).stdout.split() == ["[]", "False"]


def test_the_metadata_lists_every_file() -> None:
    shim = ROOT / "kbit/integrations/bitsandbytes/shim"
    info = shim / "bitsandbytes-0.50.2+kbit.dist-info"
    listed = {line.split(",")[0] for line in (info / "RECORD").read_text().splitlines()}
    files = [path for path in shim.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert listed == {path.relative_to(shim).as_posix() for path in files}


def test_models_pickle_whole_under_the_names_of_bitsandbytes(tmp_path: Path) -> None:
    code = (
        "import bitsandbytes as bnb, torch, sys\n"
        "m = [bnb.nn.LinearNF4(64, 8), bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)]\n"
        "m = torch.nn.Sequential(*m).to('cpu')\n"
        "x = torch.randn(2, 64)\n"
        "torch.save(m, sys.argv[1] if len(sys.argv) > 1 else 'm.pt')\n"
        "n = torch.load('m.pt', weights_only=False)\n"
        "assert torch.equal(m(x), n(x)) and type(n[0].weight) is bnb.nn.Params4bit and n[0].weight.module is n[0]\n"
        "assert type(n[1].weight) is bnb.nn.Int8Params\n"
        "print(b'kbit' in open('m.pt', 'rb').read())\n"
    )
    env = environment(True)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
