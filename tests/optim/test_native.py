"""The compiled step: other instruction sets give the same bits, and without a compiler plain torch serves."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

import pytest
import torch

import kbit.optim as optim
from kbit.kernels.cpu import compile as compiler
from kbit.kernels.cpu import optim as kernel


def run(sizes: tuple[int, ...] = (5000, 777)) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n).to(d)) for n in sizes for d in (torch.float32, torch.float16)]
    optimizer = optim.AdEMAMix8bit(params, lr=0.01, min_8bit_size=1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86 compilers")
@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx512f", "-mno-avx", "-mno-f16c", "-O1")])
def test_other_instruction_sets_give_the_same_bits(flags, monkeypatch, tmp_path):
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path))
    if not kernel.available():
        pytest.skip("no C++ compiler here")
    usual = run()
    load = compiler.load
    monkeypatch.setattr(compiler, "load", lambda source: load(source, ("-march=native", *flags)))
    monkeypatch.setattr(compiler, "_NATIVE", {})
    kernel._library.cache_clear()
    try:
        assert kernel.available()
        assert list(tmp_path.glob("*.so"))
        for a, b in zip(usual, run(), strict=True):
            assert torch.equal(a, b)
    finally:
        kernel._library.cache_clear()


def test_without_a_compiler_one_log_line_and_plain_torch(monkeypatch, tmp_path, caplog):
    usual = run()
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "missing-compiler"))
    compiler.load.cache_clear()
    kernel._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="kbit"):
            plain = run()
            run()
        assert len(caplog.records) == 1 and "no C++ compiler" in caplog.text
        for a, b in zip(usual, plain, strict=True):
            assert torch.equal(a, b)
    finally:
        compiler.load.cache_clear()
        kernel._library.cache_clear()


def test_library_is_compiled_once_and_named_by_what_it_depends_on(monkeypatch, tmp_path):
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    library = compiler.load(source)
    if library is None:
        pytest.skip("no C++ compiler here")
    assert library.answer() == 42
    first = compiler._build(source, ())
    stamp = first.stat().st_mtime_ns
    assert compiler._build(source, ()) == first and first.stat().st_mtime_ns == stamp
    source.write_text('extern "C" int answer() { return 43; }')
    assert compiler._build(source, ()) != first
    assert not [p for p in Path(tmp_path / "cache").iterdir() if p.suffix != ".so"], "scratch files are left"


def test_a_source_that_does_not_compile_is_reported(monkeypatch, tmp_path, caplog):
    source = tmp_path / "broken.cpp"
    source.write_text("this is not C++")
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, logger="kbit"):
        assert compiler.load(source) is None
    assert "broken" in caplog.text
