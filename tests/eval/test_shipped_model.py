"""What the shipped model promises, on a larger piece of the held-out text than the quick demo reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kbit import KbitConfig, quantize_model
from kbit.assets import demo_model, heldout_text
from kbit.eval import encode, inject_outliers, layer_errors, perplexity

TOKENS = 12_000


@pytest.fixture(scope="module")
def ids() -> Tensor:
    from transformers import AutoTokenizer

    with open(heldout_text(), encoding="utf-8") as stream:
        return encode(AutoTokenizer.from_pretrained(demo_model()), stream.read())


def load(dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype).eval()


@pytest.fixture(scope="module")
def values(ids: Tensor) -> dict[str, float]:
    """Perplexity by format."""
    result = {"bf16": perplexity(load(), ids, max_tokens=TOKENS).value}
    for name in ("int8", "nf4", "fp4"):
        model = quantize_model(load(), KbitConfig.from_format(name))
        result[name] = perplexity(model, ids, max_tokens=TOKENS).value
    return result


def test_it_has_learnt_the_language(values: dict[str, float]) -> None:
    """Far below the perplexity of its vocabulary of 4,096."""
    assert values["bf16"] < 30


def test_int8_and_nf4_stay_close_and_in_order(values: dict[str, float]) -> None:
    assert values["int8"] == pytest.approx(values["bf16"], rel=0.005)
    assert values["int8"] < values["nf4"] <= 1.06 * values["bf16"]
    assert values["nf4"] < values["fp4"]


def test_outliers_do_not_hurt_llm_int8(ids: Tensor) -> None:
    """Activations in int8 at every token count: within half a percent of bf16, where plain int8 loses a tenth."""
    found = {}
    for threshold in (None, 6.0, 0.0):
        model = load()
        inject_outliers(model)
        if threshold is not None:
            quantize_model(model, KbitConfig(bits=8, outlier_threshold=threshold, int8_activations=True))
        found[threshold] = perplexity(model, ids, max_tokens=6_000).value
    assert found[6.0] == pytest.approx(found[None], rel=0.005)
    assert found[0.0] > 1.05 * found[None]


def test_error_of_the_weights_follows_the_same_order() -> None:
    model = load()
    errors = {name: layer_errors(model, KbitConfig.from_format(name)) for name in ("int8", "nf4", "fp4")}
    for int8, nf4, fp4 in zip(*errors.values(), strict=True):
        assert int8.name == nf4.name == fp4.name
        assert int8.error < nf4.error / 20 < fp4.error / 20


def test_outliers_change_the_features_and_not_the_function(ids: Tensor) -> None:
    """In fp32, and up to its rounding: a library may add in another order from one call to the next."""
    model = load(torch.float32)
    channels = inject_outliers(load(torch.float32))["model.layers.3.input_layernorm"]
    seen: list[Tensor] = []
    model.model.layers[3].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        before = model(input_ids=ids[None, :200]).logits
        inject_outliers(model)
        after = model(input_ids=ids[None, :200]).logits
        model.model.layers[3].input_layernorm.weight[channels] /= 2  # what a column not divided would do
        other = model(input_ids=ids[None, :200]).logits
    assert (after - before).norm() < 1e-4 * before.norm()
    assert (other - before).norm() > 2e-3 * before.norm()
    assert seen[1][..., channels].norm() == pytest.approx(64 * float(seen[0][..., channels].norm()), rel=1e-3)
