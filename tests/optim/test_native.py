"""The compiled step: other instruction sets give the same bits, and without a compiler plain torch serves."""

from __future__ import annotations

import pytest
import torch

import kbit.optim as optim
from kbit.kernels.cpu import build, library
from kbit.ops import cpu


def run(sizes: tuple[int, ...] = (5000, 777)) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n).to(d)) for n in sizes for d in (torch.float32, torch.float16)]
    optimizer = optim.AdEMAMix8bit(params, lr=0.01, min_8bit_size=1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]


@pytest.fixture
def fresh(monkeypatch):
    """The loader looks again, with the environment of the test, and once more after it."""
    cpu.reset()
    yield monkeypatch
    monkeypatch.undo()
    cpu.reset()


@pytest.mark.parametrize("level", list(build.levels()))
def test_other_instruction_sets_give_the_same_bits(level, fresh):
    usual = run()
    cpu.reset()
    fresh.setenv("KBIT_CPU_LEVEL", level)
    if not library.available():
        pytest.skip("no C++ compiler here")
    for a, b in zip(usual, run(), strict=True):
        assert torch.equal(a, b)


def test_without_native_kernels_plain_torch_gives_the_same_bits(fresh):
    usual = run()
    cpu.reset()
    fresh.setenv("KBIT_NATIVE", "0")
    assert not library.available()
    for a, b in zip(usual, run(), strict=True):
        assert torch.equal(a, b)
