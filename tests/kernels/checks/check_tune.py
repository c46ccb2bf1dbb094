"""Tuning: which candidate wins, what drops out, and that the file it writes is found again. Times are made up."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from kbit.kernels.triton import tiles, tune

SHAPES = [(64, 128), (96, 64)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KBIT_TUNED", str(tmp_path))
    tiles.forget()
    yield tmp_path
    tiles.forget()


def made_up(calls):
    """Seconds that depend on the tile alone: 8 warps beat 4, and 2 stages the others."""
    tile = calls[0].args[-1]
    assert isinstance(tile, tiles.Tile) and all(call.args[-1] == tile for call in calls)
    return 1.0 / tile.warps + 0.01 * tile.stages


@pytest.mark.parametrize("name", tune.OPERATIONS)
def test_every_operation_runs_its_candidates(name, folder, device, monkeypatch):
    operation = tune.OPERATIONS[name]
    some = dataclasses.replace(
        operation,
        max_m=operation.max_m[:2],
        candidates=lambda m: operation.candidates(m)[:: max(1, len(operation.candidates(m)) // 2)],
    )
    monkeypatch.setitem(tune.OPERATIONS, name, some)
    found = list(tune.tune(torch.device(device), [name], made_up, SHAPES, copies=2))
    assert [m.max_m for m in found] == list(some.max_m)
    for measured in found:
        assert measured.operation == name and 0 < measured.seconds <= measured.before < math.inf
        rules = [*some.candidates(measured.max_m), tiles.rule_for(name, "", measured.max_m)]
        assert measured.rule in [{k: v for k, v in rule.items() if k != "max_m"} for rule in rules]


def test_the_fastest_right_candidate_wins(folder, device, monkeypatch):
    rules = [{"bm": 16, "bn": 32, "bk": 64, "warps": w, "stages": s} for w in (4, 8) for s in (2, 3)]
    wrong, broken = {**rules[0], "warps": 16}, {**rules[0], "warps": 32}

    def candidates(m):
        return [broken, wrong, *rules]

    prepare = tune.OPERATIONS["linear_4bit"].prepare

    def faulty(product, tile):
        if tile.warps == 32:
            raise RuntimeError("out of registers")
        return product(tile) * (1.1 if tile.warps == 16 else 1)

    def prepared(*args):
        calls = prepare(*args)
        return [tune.partial(_Faulty(call, faulty), *call.args[:1]) for call in calls]

    class _Faulty:
        def __init__(self, product, run):
            self.product, self.run = product, run

        def __call__(self, x, tile):
            return self.run(self.product, tile)

    operation = tune.Operation((16,), candidates, prepared)
    monkeypatch.setitem(tune.OPERATIONS, "linear_4bit", operation)
    (best,) = tune.tune(torch.device(device), ["linear_4bit"], made_up, SHAPES, copies=2)
    assert best.rule == rules[2]


def test_what_is_written_serves(folder, monkeypatch):
    monkeypatch.setattr(tiles, "gpu_of", lambda device: "My GPU 9000")
    default = tiles.rules("My GPU 9000")
    rule = {"bm": 16, "bn": 32, "bk": 64, "split": 0, "warps": 8, "stages": 2}
    path = tiles.user_folder() / tiles.file_name("My GPU 9000")
    tune.write([tune.Measured("linear_4bit", 16, rule, 1e-5, 2e-5)], path)
    tune.write([tune.Measured("experts_4bit", 16, rule, 1e-5, 2e-5)], path)
    assert json.loads(path.read_text()) == {
        "linear_4bit": [{"max_m": 16, **rule}],
        "experts_4bit": [{"max_m": 16, **rule}],
    }
    again = tiles.rules("My GPU 9000")
    assert again["linear_4bit"] == [{"max_m": 16, **rule}] and again["llm_int8"] == default["llm_int8"]
    assert tiles.rule_for("linear_4bit", "My GPU 9000", 5000)["warps"] == 8
    assert tiles.rules("Another GPU") == default


def test_an_unknown_operation_is_named(device):
    with pytest.raises(ValueError, match="linear_5bit"):
        list(tune.tune(torch.device(device), ["linear_5bit"]))
