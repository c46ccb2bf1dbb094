"""Relative squared error of quantized weights, from a floating point model and against a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch

from kbit import KbitConfig, quantize, quantize_model
from kbit.eval import layer_errors, quantized_layer_errors, relative_error
from kbit.eval.layer_error import LayerError, mean_error
from tests.integrations import tiny_models

FORMATS = ["nf4", "nf4-plain", "fp4", "int8"]


def test_relative_error_by_hand() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx(1 / 25)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.zeros(3), torch.ones(3)) == float("inf")
    with pytest.raises(ValueError, match=r"\[2\] with \[3\]"):
        relative_error(torch.zeros(2), torch.zeros(3))


def test_chunks_do_not_change_the_error() -> None:
    w = torch.randn(2100, 2100)
    approximation = w + 0.01 * torch.randn_like(w)
    expected = float((w - approximation).double().square().sum() / w.double().square().sum())
    assert relative_error(w, approximation) == pytest.approx(expected, rel=1e-6)


def test_gaussian_weights_have_the_published_error() -> None:
    """NF4 at block 64 on Gaussian weights: 8.46e-3; FP4 is about twice as bad, int8 two orders better."""
    w = torch.randn(512, 1024)
    errors = {name: relative_error(w, quantize(w, name).dequantize()) for name in FORMATS}
    assert errors["nf4-plain"] == pytest.approx(8.46e-3, rel=0.02)
    assert 1.3 < errors["fp4"] / errors["nf4"] < 2.5
    assert errors["int8"] < 2e-4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", FORMATS)
def test_both_ways_agree(architecture: str, name: str) -> None:
    """Predicted from the floating point model, and measured on the quantized one: the same numbers."""
    model = tiny_models.MODELS[architecture]().bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = KbitConfig.from_format(name)
    predicted = layer_errors(model, config)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    quantized = quantize_model(copy.deepcopy(model), config)
    measured = quantized_layer_errors(quantized, before.get)
    assert [e.name for e in measured] == [e.name for e in predicted]
    assert len(measured) > 7
    for a, b in zip(predicted, measured, strict=True):
        assert b.error == pytest.approx(a.error, rel=1e-6)
        assert 0 < b.error < 0.05
        assert a.numel == b.numel


def test_modules_without_a_reference_are_left_out() -> None:
    model = tiny_models.llama()
    weights = dict(model.state_dict())
    quantize_model(model, KbitConfig())
    del weights["model.layers.0.mlp.up_proj.weight"]
    names = [e.name for e in quantized_layer_errors(model, weights.get)]
    assert "model.layers.0.mlp.up_proj" not in names
    assert "model.layers.1.mlp.up_proj" in names


def test_mean_weighs_by_elements() -> None:
    assert mean_error([LayerError("a", 1.0, 1), LayerError("b", 0.0, 3)]) == 0.25
