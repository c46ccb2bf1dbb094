"""State dicts of the drop-in's layers: they load into what wrote them, and damage is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.integrations.dropin.layers import MAKERS, both, int8, nf4


@both
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_state_dict_loads_into_what_wrote_it(make, assign: bool, moved: bool) -> None:  # type: ignore[no-untyped-def]
    """#1946: keys were written that were never loaded."""
    source = nn.Sequential(make().to("cpu"), nn.ReLU())
    target = nn.Sequential(make(), nn.ReLU())
    target = target.to("cpu") if moved else target
    result = target.load_state_dict(source.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(4, 128)
    assert torch.equal(target(x), source(x)) and type(target[0].weight) is type(source[0].weight)
    saved = target.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in source.state_dict().items())


@both
def test_a_state_dict_loads_on_the_meta_device(make) -> None:  # type: ignore[no-untyped-def]
    source = make().to("cpu")
    with torch.device("meta"):
        target = make()
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(4, 128)
    assert torch.equal(target(x), source(x))


def test_float_weights_load_before_the_move_and_not_after() -> None:
    for make in MAKERS.values():
        plain = nn.Linear(128, 32)
        layer = make()
        layer.load_state_dict(plain.state_dict())
        layer.to("cpu")
        with pytest.raises(RuntimeError, match="quantized already: load the state dict before"):
            layer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("weight.absmax"), "lacks weight.absmax"),
        (lambda s: s.pop("weight"), "weight is missing, but its quantization state is there"),
        (lambda s: s.update({"weight.nested_absmax": s["weight.nested_absmax"][:0]}), "nested_absmax is"),
        (lambda s: s.update({"weight.extra": torch.ones(1)}), "extra weight.extra"),
        (lambda s: s.update({"weight": s["weight"][:-1]}), "take 2048 bytes"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("weight.")], "packed 4-bit codes without their state"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_damaged_4bit_state_dict_is_an_error_even_unstrictly(change, words: str, strict: bool) -> None:  # type: ignore[no-untyped-def]
    state = dict(nf4().to("cpu").state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=words):
        nf4().load_state_dict(state, strict=strict)


def test_a_4bit_state_dict_of_another_layer_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"quantized \[32, 128\], but this layer needs \[16, 256\]"):
        nf4(256, 16).load_state_dict(nf4(128, 32).to("cpu").state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("SCB"), "SCB, the row scales of the int8 weight, is missing"),
        (lambda s: s.pop("weight"), "SCB is there without weight"),
        (lambda s: s.update(weight_format=torch.tensor(2, dtype=torch.uint8)), "col_turing"),
        (lambda s: s.update(SCB=s["SCB"][:-1]), "expected 32"),
        (lambda s: s.update(weight=s["weight"][:, :-1]), "needs"),
        (lambda s: s.update(weight=s["weight"].float()), "SCB is there, but weight is torch.float32"),
    ],
)
def test_a_damaged_8bit_state_dict_is_an_error(change, words: str) -> None:  # type: ignore[no-untyped-def]
    state = dict(int8().to("cpu").state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=words):
        int8().load_state_dict(state, strict=False)
