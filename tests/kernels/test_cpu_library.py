"""The native CPU library: compiled once, for a level, by several processes at once, or not at all."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kbit.kernels.cpu import build, library
from kbit.ops import backends, cpu

SETTINGS = ("KBIT_NATIVE", "KBIT_CPU_LEVEL", "KBIT_NATIVE_FLAGS")


def plain_environment(**more: str) -> dict[str, str]:
    """Of a process that is to load the library as by default."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**kept, "PYTHONPATH": os.getcwd(), **more}


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The loader looks again, with the environment of the test, and once more after it."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    cpu.reset()
    yield monkeypatch
    monkeypatch.undo()
    cpu.reset()


def need_compiler() -> None:
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler here")


def test_switched_off(fresh):
    fresh.setenv("KBIT_NATIVE", "0")
    assert "KBIT_NATIVE" in library.why_not()
    assert not library.available() and cpu.kernels("optim") is None
    line = next(b for b in backends() if b.name == "native")
    assert not line.active and "KBIT_NATIVE" in line.reason
    with pytest.raises(RuntimeError, match="KBIT_NATIVE"):
        library.library()


def test_no_compiler_is_one_log_line_with_the_remedy(fresh, tmp_path, caplog):
    fresh.setenv("KBIT_CACHE", str(tmp_path))
    fresh.setenv("CXX", str(tmp_path / "missing-compiler"))
    if (build.FOLDER / build.shipped_name()).exists():
        pytest.skip("this installation ships the library")
    with caplog.at_level(logging.WARNING, logger="kbit"):
        assert library.why_not() == library.why_not() is not None
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text and ("install" in caplog.text or sys.platform not in ("linux", "darwin"))
    assert "no C++ compiler" in next(b for b in backends() if b.name == "native").reason


def test_a_cache_that_cannot_be_written_says_how_to_have_another(fresh, tmp_path):
    def refused(wanted):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x"))

    fresh.setenv("KBIT_CACHE", str(tmp_path))
    fresh.setattr(library, "_compiled", refused)
    if (build.FOLDER / build.shipped_name()).exists():
        pytest.skip("this installation ships the library")
    assert library.why_not().startswith(f"{tmp_path} cannot be written (Permission denied): set KBIT_CACHE to")


def test_a_library_that_was_cut_off_is_compiled_again(fresh, tmp_path):
    """Loading it would end the process with SIGBUS."""
    need_compiler()
    if (build.FOLDER / build.shipped_name()).exists():
        pytest.skip("this installation ships the library")
    fresh.setenv("KBIT_CACHE", str(tmp_path))
    fresh.setenv("KBIT_CPU_LEVEL", "base")
    path = library.library().path
    whole = path.read_bytes()
    for length in (0, 8, 1000, len(whole) - 1):
        short = path.with_name(f"short-{length}.so")  # the loaded one must not change under the process
        short.write_bytes(whole[:length])
        assert not library._is_whole(short)
    assert library._is_whole(path)
    path.unlink()
    path.write_bytes(whole[:1000])
    cpu.reset()
    assert library.available() and path.read_bytes() == whole


def test_broken_compiler(fresh, tmp_path, caplog):
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\ncase $1 in --version) echo broken 1.0;; *) echo 'out of luck' >&2; exit 1;; esac\n")
    script.chmod(0o755)
    fresh.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    fresh.setenv("CXX", str(script))
    if (build.FOLDER / build.shipped_name()).exists():
        pytest.skip("this installation ships the library")
    with caplog.at_level(logging.WARNING, logger="kbit"):
        assert "out of luck" in library.why_not()
    assert not list((tmp_path / "cache").iterdir()), "scratch files are left"


def test_a_compiler_that_does_not_know_this_cpus_level_compiles_the_next(fresh, tmp_path, caplog):
    need_compiler()
    if (build.FOLDER / build.shipped_name()).exists():
        pytest.skip("this installation ships the library")
    fresh.setenv("KBIT_CACHE", str(tmp_path / "usual"))
    usual = library.library().level
    if usual == "base":
        pytest.skip("no level above base on this CPU")
    cpu.reset()
    script = tmp_path / "c++"
    # Flags of the highest level, by which it is recognised, are refused as an old compiler would.
    flag = next(f for f in build.level_flags(usual) if all(f not in build.level_flags(n) for n in lower(usual)))
    real = " ".join(build.compiler())
    script.write_text(
        f'#!/bin/sh\nfor f; do [ "$f" = {flag} ] && echo unrecognized $f >&2 && exit 1; done\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    fresh.setenv("KBIT_CACHE", str(tmp_path / "old"))
    fresh.setenv("CXX", str(script))
    with caplog.at_level(logging.WARNING, logger="kbit"):
        assert library.library().level == lower(usual)[-1]
    assert usual in caplog.text and flag in caplog.text


def lower(level: str) -> list[str]:
    names = list(build.levels())
    return names[: names.index(level)]


def test_unknown_level_names_the_known_ones(fresh):
    fresh.setenv("KBIT_CPU_LEVEL", "avx1024")
    assert "avx1024" in library.why_not() and "base" in library.why_not()


def test_two_processes_compile_at_once(tmp_path):
    need_compiler()
    environment = plain_environment(KBIT_CACHE=str(tmp_path), KBIT_CPU_LEVEL="base")
    code = "from kbit.kernels.cpu import library; print(library.library().level, library.library().path)"
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate(timeout=300)[0].strip() for process in running}
    assert len(said) == 1 and said.pop().startswith("base ")
    assert len(list(tmp_path.iterdir())) <= 1, "scratch files are left"


def test_library_of_all_levels(tmp_path):
    """What a wheel ships: every level, no weak symbol that a level could lend to a lower one."""
    need_compiler()
    out = tmp_path / build.shipped_name()
    build.compile_library(out, list(build.levels()), build.compiler(), extra=("-O0",))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("no nm here")
    symbols = subprocess.run(["nm", "--defined-only", str(out)], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[2] for line in symbols.splitlines() if re.search(r" T ", line)}
    for level in build.levels():
        assert f"kbit_optim_step_{level}" in exported
    # Compiled as it is shipped: optimized, or inlined functions of the C++ library would count.
    for level in ("base", list(build.levels())[-1]):
        for source in build.KERNELS:
            made = tmp_path / f"{source}-{level}.o"
            command = [*build.compiler(), *build.FLAGS, *build.level_flags(level)]
            build.run([*command, "-c", str(build.FOLDER / f"{source}.cpp"), "-o", str(made)])
            listing = subprocess.run(["nm", "--defined-only", str(made)], capture_output=True, text=True).stdout
            assert not re.findall(r" [WVu] (\S+)", listing), source


def test_source_hash_follows_the_sources(monkeypatch, tmp_path):
    for path in [*build.FOLDER.glob("*.cpp"), *build.FOLDER.glob("*.h")]:
        shutil.copy(path, tmp_path / path.name)
    before = build.source_hash()
    monkeypatch.setattr(build, "FOLDER", Path(tmp_path))
    assert build.source_hash() == before
    with (tmp_path / "platform.cpp").open("a") as file:
        file.write("// another version\n")
    assert build.source_hash() != before


def test_threads_of_a_forked_child(tmp_path):
    """A child of fork has none of its parent's threads: it must not wait for them."""
    need_compiler()
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    code = """
import ctypes, os, sys
from kbit.kernels.cpu import library
handle = library.library().handle
BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def calls():
    seen = []
    body = BODY(lambda data: seen.append(1))
    handle.kbit_parallel(body, None, 2)
    return len(seen)
assert calls() == 2
child = os.fork()
if child == 0:
    os._exit(0 if calls() == 2 else 3)
assert os.waitpid(child, 0)[1] == 0
assert calls() == 2
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=plain_environment(), timeout=120)
    assert done.returncode == 0
