"""What surrounds NVRTC, without a GPU: headers that a source includes, the cache's key, threads that ask at once."""

from __future__ import annotations

import ctypes
import re
import threading
import time

import pytest

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import linear_8bit, linear_8bit_wide, llm_int8, optim, quantize_4bit

SOURCES = sorted(compiler.FOLDER.glob("*.cu"))


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Sources, headers and cache in empty folders; a compiler that takes its time and notes what it is given."""
    calls = []

    def compile_cubin(source, name, arch, settings, headers):
        time.sleep(0.05)
        calls.append((name, source, dict(headers)))
        return f"machine code {len(calls)}".encode()

    class Version:
        @staticmethod
        def nvrtcVersion(major, minor):
            major._obj.value, minor._obj.value = 13, 0

    monkeypatch.setattr(compiler, "nvrtc", lambda: Version)
    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    return calls


def test_headers_are_found_by_name_and_are_part_of_the_key(compiled, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "FOLDER", tmp_path)
    (tmp_path / "k.cu").write_text('#include "a.h"\n#include "made.h"\n')
    (tmp_path / "a.h").write_text('#include "b.h"\n#include "a.h"\n')
    (tmp_path / "b.h").write_text("// one\n")
    made = {"made.h": "// made\n"}
    first = compiler.cubin("k", "sm_90a", {}, made)
    assert compiled[0][2].keys() == {"a.h", "b.h", "made.h"} and compiled[0][2]["b.h"] == "// one\n"
    assert compiler.cubin("k", "sm_90a", {}, made) == first and len(compiled) == 1
    (tmp_path / "b.h").write_text("// two\n")  # a header of a header
    assert compiler.cubin("k", "sm_90a", {}, made) != first and len(compiled) == 2
    assert compiler.cubin("k", "sm_90a", {}, {"made.h": "// other\n"}) != first and len(compiled) == 3
    (tmp_path / "k.cu").write_text('#include "none.h"\n')
    with pytest.raises(FileNotFoundError, match=r"none\.h"):
        compiler.cubin("k", "sm_90a", {}, made)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_header_of_a_kernel_is_here(source):
    """Or is made for its settings, as wgmma.h and wgmma_s8.h are. Nothing comes from a CUDA toolkit."""
    text = source.read_text()
    headers = compiler.with_headers(text, {"wgmma.h": "", "wgmma_s8.h": ""})
    assert not re.search(r"#include\s*<", "\n".join([text, *headers.values()]))


LOADS = [
    linear_8bit._load,
    linear_8bit_wide._load,
    llm_int8._load,
    llm_int8._load_rows,
    llm_int8._load_gather,
    quantize_4bit._load,
    optim._load,
]


@pytest.mark.parametrize("load", LOADS, ids=lambda load: f"{load.__module__.rpartition('.')[2]}.{load.__name__}")
def test_launchers_are_made_once(load):
    assert load.__code__ is compiler.once(lambda: None).__code__


def test_threads_that_need_a_kernel_at_once_compile_it_once(compiled, monkeypatch):
    loaded = []
    monkeypatch.setattr(compiler, "load", lambda *args: loaded.append(args) or ctypes.c_void_p(1))
    monkeypatch.setattr(compiler, "driver", lambda: type("Driver", (), {"cuLaunchKernelEx": type("F", (), {})()}))
    load = compiler.once(linear_8bit._load.__wrapped__)  # with a memory of its own
    got = []
    threads = [threading.Thread(target=lambda: got.append(load(0, linear_8bit.Config(8), False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == len(loaded) == 1
    assert len(got) == 4 and all(launcher is got[0] for launcher in got)
    assert load(0, linear_8bit.Config(16), False) is not got[0] and len(compiled) == 2
