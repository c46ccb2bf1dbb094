"""Outlier features are put in without changing the function, and do to int8 what they do in large models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kbit import KbitConfig, quantize_model
from kbit.eval import inject_outliers, scale_channels
from tests.integrations import tiny_models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [1, 5, 8])
def test_the_function_is_the_same_to_the_bit(dtype: torch.dtype, exponent: int) -> None:
    model = tiny_models.llama().to(dtype).eval()
    before = tiny_models.logits(model)
    channels = inject_outliers(model, count=3, exponent=exponent)
    assert torch.equal(tiny_models.logits(model), before)
    assert len(channels) == 4  # two norms in each of two layers
    assert all(len(set(c)) == 3 for c in channels.values())


def test_the_features_really_grow() -> None:
    model = tiny_models.llama().eval()
    seen: dict[str, torch.Tensor] = {}
    projection = model.model.layers[1].mlp.up_proj
    hook = projection.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
    tiny_models.logits(model)
    before = seen["x"]
    channels = inject_outliers(model, count=2, exponent=6)["model.layers.1.post_attention_layernorm"]
    tiny_models.logits(model)
    hook.remove()
    assert torch.equal(seen["x"][..., channels], before[..., channels] * 64)
    others = [c for c in range(before.shape[-1]) if c not in channels]
    assert torch.equal(seen["x"][..., others], before[..., others])


def test_int8_with_and_without_threshold() -> None:
    """The error of the outputs: plain int8 loses the small features, LLM.int8() keeps them."""
    torch.manual_seed(1)
    ids = torch.randint(1, tiny_models.VOCABULARY, (2, 40))

    def outputs(config: KbitConfig | None) -> torch.Tensor:
        torch.manual_seed(2)
        model = tiny_models.llama(intermediate_size=256).eval()
        inject_outliers(model, count=2, exponent=5)
        if config is not None:
            quantize_model(model, config)
        with torch.no_grad():
            return model(input_ids=ids).logits

    exact = outputs(None)
    plain = (outputs(KbitConfig(bits=8, outlier_threshold=0.0)) - exact).square().mean()
    split = (outputs(KbitConfig(bits=8, outlier_threshold=6.0)) - exact).square().mean()
    assert plain > 5 * split


def test_layer_norm_with_bias() -> None:
    norm, reader = nn.LayerNorm(32), nn.Linear(32, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(5, 32)
    before = reader(norm(x))
    scale_channels(norm, [reader], torch.tensor([3, 7]), 4)
    assert torch.equal(reader(norm(x)), before)


def test_what_would_not_be_exact_is_refused_and_changes_nothing() -> None:
    model = tiny_models.llama().half()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="not exact in torch.float16"):
        inject_outliers(model, exponent=20)
    quantize_model(model, KbitConfig())
    with pytest.raises(ValueError, match="before it is quantized"):
        inject_outliers(model)
    untouched = [key for key in state if key in model.state_dict() and "norm" in key]
    assert untouched
    assert all(torch.equal(state[key], model.state_dict()[key]) for key in untouched)


def test_norms_that_add_one_are_refused() -> None:
    class PlusOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1 + self.weight)

    norm = PlusOne()
    weight = norm.weight.detach().clone()
    with pytest.raises(ValueError, match="PlusOne is not proportional"):
        scale_channels(norm, [nn.Linear(8, 4)], torch.tensor([1]), 3)
    assert torch.equal(norm.weight, weight)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no Llama-like"):
        inject_outliers(tiny_models.gpt2())
