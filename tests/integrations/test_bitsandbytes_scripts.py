"""Scripts written for bitsandbytes run unchanged through `kbit run`: other people's documents, and examples/dropin."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.integrations.dropin.documents import python_of, script_of
from tests.integrations.dropin.harness import ROOT, run_kbit, save_llama

pytestmark = pytest.mark.transformers

FOLDER = os.environ.get("KBIT_SCRIPTS_DIR")
DOCUMENTS = sorted(Path(FOLDER).glob("*.txt")) if FOLDER else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def transformers_major() -> int:
    import transformers

    return int(transformers.__version__.split(".")[0])


@pytest.mark.skipif(not FOLDER, reason="KBIT_SCRIPTS_DIR is not set")
def test_the_folder_holds_the_documents() -> None:
    assert len(DOCUMENTS) >= 3
    assert all(python_of(path.read_text()) for path in DOCUMENTS)


@pytest.mark.skipif(not FOLDER, reason="KBIT_SCRIPTS_DIR is not set")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name[:3])
def test_document_runs(document: Path, model: Path, tmp_path: Path) -> None:
    text, changed = script_of(document.read_text(), str(model), DEVICE, transformers_major())
    # The successors of keywords that transformers 5 dropped, and a CPU's 16-bit training: nothing else is touched.
    allowed = {"load_in_8bit", "load_in_4bit", "tokenizer"} if transformers_major() >= 5 else set()
    assert set(changed) <= allowed | ({"fp16"} if DEVICE == "cpu" else set())
    script = tmp_path / "script.py"
    # What each document is about must really have happened: kbit was bitsandbytes, and layers were quantized.
    proof = (
        "import bitsandbytes, json, sys\n"
        "_kinds = sorted({type(m).__name__ for v in list(globals().values()) if isinstance(v, torch.nn.Module)\n"
        "                 for m in v.modules()})\n"
        "print('PROOF', json.dumps([bitsandbytes.__version__, _kinds]))\n"
    )
    script.write_text(text + proof)
    done = run_kbit(script, cwd=tmp_path)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr[-5000:]}"
    version, kinds = json.loads(done.stdout.split("PROOF ")[1])
    assert version.endswith("+kbit")
    assert {"Linear4bit", "Linear8bitLt"} & set(kinds)


def test_lost_fences_and_indentation_are_restored() -> None:
    text = (
        'Prose. Let us see.\nfrom a import b\nx = b(\n1,\nkey="("\n)\n# note\nwith x as y: # why\nz = y(2)\n'
        "print(z)\nSome more prose with f(x) in it.\n"
    )
    (code,) = python_of(text)
    assert code.splitlines()[-2:] == ["    z = y(2)", "print(z)"]
    compile(code, "code", "exec")
    assert "rose" not in code


EXAMPLES = sorted((ROOT / "examples" / "dropin").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, model: Path, tmp_path: Path) -> None:
    takes_model = "sys.argv[1]" in example.read_text()
    done = run_kbit(example, *([model] if takes_model else []), cwd=tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    assert done.stdout.strip()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


def test_kbit_run_passes_arguments_paths_and_exit_code(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("value = 7\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys, helper\n"
        "code = 'import bitsandbytes; print(bitsandbytes.__version__)'\n"
        "child = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)\n"
        "print(__name__, helper.value, sys.argv[1:], child.stdout.strip())\n"
        "sys.exit(5)\n"
    )
    done = run_kbit(script, "--help", "-m", "x y")
    assert done.returncode == 5
    name, value, *rest = done.stdout.split(maxsplit=2)
    assert (name, value) == ("__main__", "7")
    assert rest[0].strip() == "['--help', '-m', 'x y'] 0.50.2+kbit"


def test_kbit_run_names_a_missing_script() -> None:
    done = run_kbit("no/such/script.py")
    assert done.returncode == 2
    assert done.stderr.strip() == "kbit: there is no script no/such/script.py"


def test_python_m_bitsandbytes_reports_kbit() -> None:
    done = run_kbit("-m", "bitsandbytes")
    assert done.returncode == 0, done.stderr
    assert "bitsandbytes 0.50.2+kbit: kbit" in done.stdout
    assert "self test: 4-bit and 8-bit layers and an 8-bit optimizer work" in done.stdout
