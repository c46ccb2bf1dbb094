"""The house rules of imports: which package may import which, what belongs where, and what `import kbit` costs."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kbit"

# formats <- kernels <- ops <- nn, optim <- checkpoint, plan, eval <- integrations <- cli. A package imports itself and
# what stands on an earlier line; packages on one line do not import each other.
RANKS = {
    "assets": 0,
    "formats": 0,
    "config": 0,
    "kernels": 1,
    "ops": 2,
    "nn": 3,
    "optim": 3,
    "checkpoint": 4,
    "plan": 4,
    "eval": 4,
    "integrations": 5,
    "cli": 6,
}
# config.py is a KbitConfig over Format: it may import formats, which never imports it.
ALLOWED_SIBLINGS = {("config", "formats")}
HUGGING_FACE = {"transformers", "accelerate", "peft", "trl", "diffusers", "huggingface_hub", "tokenizers", "datasets"}
# Packages that may import Hugging Face libraries inside functions; integrations may do so anywhere.
MAY_IMPORT_LAZILY = {"checkpoint", "plan", "eval", "cli"}


@dataclass(frozen=True)
class Import:
    path: Path
    line: int
    target: str  # dotted name of what is imported
    at_import: bool  # runs when the module is imported, not inside a function or under TYPE_CHECKING

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"


def imports_of(path: Path) -> Iterator[Import]:
    """Every import statement in a file, relative ones resolved, `from a import b` as a.b."""
    module = list(path.relative_to(ROOT).with_suffix("").parts)
    package = module[:-1]

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(path, node.lineno, f"{prefix}.{alias.name}", at_import)
        else:
            inner = at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                inner = False
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), True)


def layer_of(path: Path) -> str | None:
    """ "ops" for kbit/ops/schemas.py, "config" for kbit/config.py, None for kbit/__init__.py and __main__.py."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if name.startswith("__") else name


def in_drop_in(path: Path) -> bool:
    """The folder that poses as bitsandbytes, and the examples that are written for bitsandbytes."""
    places = (PACKAGE / "integrations" / "bitsandbytes", ROOT / "examples" / "dropin")
    return any(path.is_relative_to(place) for place in places)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
IMPORTS = [found for path in FILES for found in imports_of(path)]


def target_layer(target: str) -> str | None:
    """The layer that `kbit.x...` belongs to; a public name counts as the module that it is loaded from."""
    import kbit

    parts = target.split(".")
    if parts[0] != "kbit" or len(parts) < 2:
        return None
    module = kbit._PUBLIC.get(parts[1])
    name = module.split(".")[1] if module else parts[1]
    return None if name.startswith("__") else name


def test_every_layer_has_a_rank() -> None:
    assert len(FILES) > 10
    assert {layer_of(path) for path in FILES} - {None} <= set(RANKS)


def test_arrows_point_one_way() -> None:
    bad = []
    for found in IMPORTS:
        source, target = layer_of(found.path), target_layer(found.target)
        if source is None or target is None or source == target or (source, target) in ALLOWED_SIBLINGS:
            continue
        if target not in RANKS or RANKS[target] >= RANKS[source]:
            bad.append(f"{found} ({source} stands before or beside {target})")
    assert not bad, "\n".join(bad)


def test_the_root_imports_only_what_it_has_to() -> None:
    """kbit/__init__.py loads its public names lazily; all it may do at once is to arm the import hook."""
    bad = [
        str(found)
        for found in imports_of(PACKAGE / "__init__.py")
        if found.at_import
        and found.target.split(".")[0] not in sys.stdlib_module_names
        and not found.target.startswith("kbit.integrations.arm")
    ]
    assert not bad, "\n".join(bad)


def test_formats_import_torch_only() -> None:
    allowed = {"torch", "kbit", *sys.stdlib_module_names}
    bad = [
        str(i) for i in IMPORTS if layer_of(i.path) in ("formats", "config") and i.target.split(".")[0] not in allowed
    ]
    assert not bad, "\n".join(bad)


def test_hugging_face_stays_in_its_place() -> None:
    bad = []
    for found in IMPORTS:
        layer = layer_of(found.path)
        if found.target.split(".")[0] not in HUGGING_FACE or layer == "integrations":
            continue
        if found.at_import or layer not in MAY_IMPORT_LAZILY:
            bad.append(str(found))
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(("library", "home"), [("triton", "kernels"), ("typer", "cli")])
def test_library_has_one_home(library: str, home: str) -> None:
    """At import time; `find_spec` and imports inside functions are how the others ask for it."""
    bad = [str(i) for i in IMPORTS if i.target.split(".")[0] == library and layer_of(i.path) != home and i.at_import]
    assert not bad, "\n".join(bad)


def test_bitsandbytes_is_a_test_oracle_only() -> None:
    folders = [PACKAGE, ROOT / "scripts", ROOT / "docs", ROOT / "examples"]
    files = [path for folder in folders for path in folder.rglob("*.py") if not in_drop_in(path)]
    bad = [str(i) for path in files for i in imports_of(path) if i.target.split(".")[0] == "bitsandbytes"]
    assert not bad, "\n".join(bad)


def test_star_imports_are_absent() -> None:
    bad = [str(i) for i in IMPORTS if i.target.endswith(".*")]
    assert not bad, "\n".join(bad)


@pytest.fixture
def checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """`imports_of` for a source text that pretends to be kbit/formats/x.py."""
    folder = tmp_path / "kbit" / "formats"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)

    def parse(source: str) -> list[tuple[str, bool]]:
        (folder / "x.py").write_text(source)
        return [(i.target, i.at_import) for i in imports_of(folder / "x.py")]

    return parse


def test_the_parser_sees_every_kind_of_import(checker) -> None:  # type: ignore[no-untyped-def]
    assert checker("from ..ops import quantize") == [("kbit.ops.quantize", True)]
    assert checker("from . import y") == [("kbit.formats.y", True)]
    assert checker("from kbit import ops") == [("kbit.ops", True)]
    assert checker("def f():\n    import transformers.models") == [("transformers.models", False)]
    assert checker("if TYPE_CHECKING:\n    import peft") == [("peft", False)]
    assert checker("try:\n    import peft\nexcept ImportError:\n    pass") == [("peft", True)]
    assert checker("class A:\n    import triton") == [("triton", True)]


# ---- what `import kbit` costs ----

_MEASURE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import kbit
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules), "cuda": torch.cuda.is_initialized()}))
"""


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_cheap() -> None:
    """Best of several processes: the machine may be busy, but it is not busy every time."""
    best = min(json.loads(run_python(_MEASURE))["seconds"] for _ in range(3))
    assert best < 0.3, f"import kbit takes {best:.3f} s beyond torch"


def test_import_touches_nothing_heavy() -> None:
    result = json.loads(run_python(_MEASURE))
    heavy = {"transformers", "accelerate", "peft", "triton", "typer", "rich", "matplotlib", "bitsandbytes"}
    assert not heavy & {name.split(".")[0] for name in result["modules"]}
    assert not result["cuda"]


def test_import_before_torch_works_alone() -> None:
    assert run_python("import kbit; print(kbit.__version__)").strip()


def test_using_the_core_imports_no_hugging_face_and_no_cuda() -> None:
    """Quantizing and running a plain torch model."""
    code = """
import sys, torch, kbit
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
kbit.quantize_model(model, kbit.KbitConfig(bits=4))
model(torch.randn(2, 64))
print(sorted({name.split(".")[0] for name in sys.modules} & {"transformers", "accelerate", "peft"}))
print(torch.cuda.is_initialized())
"""
    assert run_python(code).split("\n")[:2] == ["[]", "False"]


def public_names() -> list[str]:
    import kbit

    return list(kbit.__all__)


@pytest.mark.parametrize("name", public_names())
def test_public_name_resolves(name: str) -> None:
    import kbit

    value = getattr(kbit, name)
    assert value is not None
    assert name in dir(kbit)
    if hasattr(value, "__module__") and not name.startswith("__"):
        assert value.__module__.startswith("kbit."), f"kbit.{name} comes from {value.__module__}"


def test_unknown_name_is_an_attribute_error() -> None:
    import kbit

    with pytest.raises(AttributeError, match="no attribute 'quantise_model'"):
        kbit.quantise_model  # noqa: B018


def test_public_names_of_every_package_exist() -> None:
    """`__all__` of each layer names what is there."""
    checked = 0
    for layer in sorted(RANKS):
        if not (PACKAGE / layer / "__init__.py").is_file():
            continue
        module = importlib.import_module(f"kbit.{layer}")
        for name in getattr(module, "__all__", []):
            assert getattr(module, name, None) is not None, f"kbit.{layer}.{name}"
            checked += 1
    assert checked > 5
