"""Strided perplexity against a computation that takes every token on its own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kbit import KbitConfig, quantize_model
from kbit.eval import perplexity
from kbit.eval.perplexity import windows
from tests.integrations import tiny_models


def text_ids(count: int, vocabulary: int = tiny_models.VOCABULARY) -> torch.Tensor:
    return torch.randint(1, vocabulary, (count,), generator=torch.Generator().manual_seed(count))


def one_by_one(model: nn.Module, ids: torch.Tensor, context: int, stride: int) -> float:
    """exp of the mean loss where every target is predicted by a forward pass of its own.

    Target t belongs to the first window (they begin at 0, stride, 2 stride ...) whose context + 1 tokens reach it.
    """
    losses = []
    with torch.no_grad():
        for t in range(1, len(ids)):
            begin = 0
            while t > begin + context:
                begin += stride
            logits = model(input_ids=ids[None, begin:t]).logits[0, -1].double()
            losses.append(-(logits - logits.logsumexp(0))[ids[t]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    return tiny_models.llama().eval()


@pytest.mark.parametrize(
    ("count", "context", "stride", "batch_size"),
    [
        (50, 16, 8, 3),
        (50, 16, 16, 2),
        (50, 16, 1, 4),
        (33, 7, 3, 1),
        (17, 16, 4, 4),
        (10, 16, 8, 4),
        (2, 16, 8, 1),
        (64, 63, 5, 4),
    ],
)
def test_every_token_is_scored_as_if_alone(llama, count: int, context: int, stride: int, batch_size: int) -> None:
    ids = text_ids(count)
    result = perplexity(llama, ids, context=context, stride=stride, batch_size=batch_size)
    assert result.tokens == count - 1
    assert result.value == pytest.approx(one_by_one(llama, ids, context, stride), rel=1e-4)
    assert result.nll == pytest.approx(math.log(result.value))


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_other_architectures(architecture: str) -> None:
    model = tiny_models.MODELS[architecture]().eval()
    ids = text_ids(40)
    assert perplexity(model, ids, context=16, stride=5).value == pytest.approx(one_by_one(model, ids, 16, 5), rel=1e-4)


def test_windows_score_each_target_once_with_enough_context() -> None:
    for count in range(2, 40):
        for context in (1, 2, 5, 8):
            for stride in range(1, context + 1):
                scored: list[int] = []
                for w in windows(count, context, stride):
                    targets = range(w.end - w.scored + 1, w.end + 1)
                    assert w.end - w.begin <= context
                    for t in targets:
                        assert t - w.begin >= min(t, context - stride + 1)
                    scored += targets
                assert scored == list(range(1, count))


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    """A model that knows nothing, with plain torch alone: no transformers config, no logits_to_keep."""

    class Uniform(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    result = perplexity(Uniform(), text_ids(300, 50), context=20, stride=7)
    assert result.value == pytest.approx(50, rel=1e-6)


def test_quantized_and_half_precision_models(llama) -> None:
    import copy

    ids = text_ids(60)
    full = perplexity(llama, ids, context=32).value
    half = perplexity(copy.deepcopy(llama).bfloat16(), ids, context=32).value
    assert half == pytest.approx(full, rel=0.01)
    four = quantize_model(copy.deepcopy(llama), KbitConfig(bits=4))
    assert perplexity(four, ids, context=32).value == pytest.approx(full, rel=0.2)
    assert perplexity(four, ids, context=32).value != full


def test_max_tokens_progress_and_mode(llama) -> None:
    ids = text_ids(60)
    seen: list[tuple[int, int]] = []
    llama.train()
    result = perplexity(llama, ids, context=8, stride=4, max_tokens=30, progress=lambda *args: seen.append(args))
    assert llama.training
    llama.eval()
    assert result.tokens == 30 == seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert result.value == perplexity(llama, ids[:31], context=8, stride=4).value
    assert result.tokens_per_second > 0


def test_defaults_come_from_the_model(llama) -> None:
    result = perplexity(llama, text_ids(200))
    assert (result.context, result.stride) == (64, 32)


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (text_ids(1), {}, "at least 2 tokens, got 1"),
        (text_ids(0), {}, "at least 2 tokens, got 0"),
        (text_ids(9), {"context": 65}, "context is 65 tokens.*reads 64"),
        (text_ids(9), {"context": 0}, "at least 1"),
        (text_ids(9), {"context": 8, "stride": 9}, "stride must be between 1 and"),
        (text_ids(9), {"context": 8, "stride": 0}, "stride must be between 1 and"),
        (text_ids(9), {"max_tokens": 0}, "max_tokens"),
        (torch.tensor([1, 2, tiny_models.VOCABULARY]), {}, "token id 320.*vocabulary has 320.*own tokenizer"),
        (torch.tensor([1, -1]), {}, "token id -1"),
        (torch.zeros(4), {}, "integer token ids"),
        (torch.zeros(2, 4, dtype=torch.long), {}, r"shape \[n\]"),
    ],
)
def test_refusals(llama, ids: torch.Tensor, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(llama, ids, **kwargs)


def test_nan_loss_is_an_error() -> None:
    model = tiny_models.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="not a number in tokens 1 to"):
        perplexity(model, text_ids(30))


def bert_as_language_model(is_decoder: bool) -> nn.Module:
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=is_decoder,
    )
    return BertLMHeadModel(config).eval()


@pytest.mark.parametrize("format_name", [None, "bf16", "nf4", "int8"])
@pytest.mark.parametrize("architecture", ["encoder", "decoder", "llama", "gpt2"])
def test_models_that_read_ahead_are_refused_and_no_others(architecture: str, format_name: str | None) -> None:
    torch.manual_seed(3)
    if architecture in ("encoder", "decoder"):
        model = bert_as_language_model(architecture == "decoder")
    else:
        model = tiny_models.MODELS[architecture]().eval()
    if format_name is not None:
        model = model.bfloat16()
        if format_name != "bf16":
            model = quantize_model(model, KbitConfig.from_format(format_name))
    for ids in (text_ids(20), torch.tensor([7, 7, 7])):
        if architecture == "encoder":
            with pytest.raises(ValueError, match="BertLMHeadModel is not causal here"):
                perplexity(model, ids)
        else:
            assert perplexity(model, ids).tokens == len(ids) - 1


def test_rounding_is_not_taken_for_reading_ahead() -> None:
    """Logits of a real size with the noise of deep bf16 models on a GPU: causal all the same."""

    class Noisy(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            table = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
            logits = table[input_ids.cumsum(1) % 50]
            return SimpleNamespace(logits=logits * (1 + 0.01 * torch.randn(logits.shape)))

    torch.manual_seed(0)
    assert perplexity(Noisy(), text_ids(30, 50), context=10).tokens == 29


def test_other_kinds_of_model_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder-decoder"):
        perplexity(tiny_models.t5(), text_ids(9))
    with pytest.raises(ValueError, match="gives no logits"):
        perplexity(tiny_models.bert().bert, text_ids(9))
