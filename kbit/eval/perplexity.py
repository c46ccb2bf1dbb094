"""Strided perplexity: how well a causal language model predicts a text, every token scored exactly once.

The text is read through windows of `context` tokens that move on by `stride`. A window scores only the targets that no
window before it has scored, so every one of them sees at least `context - stride` tokens to its left. Perplexity is
exp of the mean negative log likelihood (nats) of all tokens but the first, which nothing predicts.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT_CONTEXT = 1024
# fp32 logits that are held at once beside the model's own.
_LOGITS_AT_ONCE = 2**24
# How much a later token may change earlier logits, by rounding alone: of what an earlier token does to later ones, and
# of the logits themselves. Encoders are far above, also with random weights (0.7 and 0.012 for a small BERT).
_LEAK, _ROUNDING = 0.1, 0.001


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    value: exp(nll). nll: mean negative log likelihood in nats. tokens: how many were scored. context, stride: of the
    windows. seconds: wall time of the forward passes. processed: tokens that went through the model, overlaps included.
    """

    value: float
    nll: float
    tokens: int
    context: int
    stride: int
    seconds: float
    processed: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens through the model a second, overlaps included: the speed of reading, not of generating."""
        return self.processed / self.seconds if self.seconds > 0 else float("inf")


@dataclass(frozen=True)
class Window:
    """Inputs `ids[begin:end]`; the targets `ids[end - scored + 1 : end + 1]` are the ones it scores."""

    begin: int
    end: int
    scored: int


def windows(count: int, context: int, stride: int) -> Iterator[Window]:
    """The windows over `count` tokens. Their scored targets are 1 to count - 1, each once, in order."""
    done = 0  # targets 1..done are scored
    begin = 0
    while done < count - 1:
        end = min(begin + context, count - 1)
        yield Window(begin, end, end - done)
        done = end
        begin += stride


def model_context(model: nn.Module) -> int | None:
    """The longest sequence that the model's config says it can read, or None where it says nothing."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_windows(model: nn.Module, context: int | None, stride: int | None) -> tuple[int, int]:
    """The context and stride to use: by default the model's context (1024 at most) and half of it.

    Raises ValueError for values that the model or the method cannot have.
    """
    limit = model_context(model)
    if context is None:
        context = min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}")
    if limit is not None and context > limit:
        raise ValueError(
            f"context is {context} tokens, but this model reads {limit} at most; use a context up to {limit}"
        )
    if stride is None:
        stride = max(1, context // 2)
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be between 1 and the context of {context} tokens, got {stride}")
    return context, stride


def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on a tokenized text.

    model: any module that maps `input_ids [b, n]` to an output with `.logits [b, n, vocabulary]` (transformers'
        `...ForCausalLM`), on any device, in any dtype, quantized or not. Its training mode is restored afterwards.
    ids: integer token ids `[n]` or `[1, n]`, n at least 2.
    context: tokens a window (default: the model's, 1024 at most). stride: tokens between windows (default: half).
    batch_size: windows that go through the model together.
    max_tokens: score the first so many tokens only.
    progress: called with (tokens scored, tokens to score) after every step.

    Raises ValueError for a text shorter than 2 tokens, for ids outside the model's vocabulary, for windows that the
    model cannot read, for a model that is not causal, and where the loss is not a number.
    """
    ids = _flat_ids(ids)
    if max_tokens is not None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        ids = ids[: max_tokens + 1]
    if ids.numel() < 2:
        raise ValueError(f"perplexity needs a text of at least 2 tokens, got {ids.numel()}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    context, stride = check_windows(model, context, stride)
    _check_model(model, ids)

    device = _input_device(model)
    keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
    total, todo = 0.0, ids.numel() - 1
    scored = processed = 0
    was_training = model.training
    model.eval()
    try:
        check_causal(model, ids)
        started = time.perf_counter()
        with torch.no_grad():
            for batch in _batches(windows(ids.numel(), context, stride), batch_size):
                keep = batch[0].scored
                inputs = torch.stack([ids[w.begin : w.end] for w in batch])
                targets = torch.stack([ids[w.end - keep + 1 : w.end + 1] for w in batch])
                logits = _logits(model, inputs.to(device), keep if keeps_last else None)[:, -keep:]
                loss = float(_negative_log_likelihood(logits, targets.to(logits.device)))
                if math.isnan(loss):
                    first = batch[0].end - keep + 1
                    raise ValueError(
                        f"the model's loss is not a number in tokens {first} to {batch[-1].end} of the text: its "
                        "weights or activations hold NaN or infinity (fp16 overflows at 65504; try bfloat16)"
                    )
                total += loss
                scored += targets.numel()
                processed += inputs.numel()
                if progress is not None:
                    progress(scored, todo)
        seconds = time.perf_counter() - started
    finally:
        model.train(was_training)
    nll = total / scored
    value = math.exp(nll) if nll < 700 else float("inf")
    return Perplexity(value, nll, scored, context, stride, seconds, processed)


def check_causal(model: nn.Module, ids: Tensor) -> None:
    """ValueError for a model that reads ahead: an encoder (BERT) opened as a language model gives logits too, but has
    seen the tokens that it is asked to predict.

    model: as for `perplexity`, in evaluation mode. ids: integer `[n]`, n at least 1, that the model can read.

    Three sequences of two tokens go through the model in one batch: two as they are but for one token, and a causal
    model gives the same logits for the first token whatever the second one is. One batch, because LLM.int8() takes its
    outlier columns from all tokens of a batch together.
    """
    if (model_context(model) or 2) < 2:
        return
    first, second = int(ids[0]), int(ids[min(1, ids.numel() - 1)])
    other = next((i for i in ids[:64].tolist() if i not in (first, second)), None)
    if other is None:
        rows = _vocabulary(model)
        other = next((i for i in range(rows or 0) if i not in (first, second)), None)
        if other is None:
            return
    probe = torch.tensor([[first, second], [first, other], [other, second]])
    with torch.no_grad():
        logits = _logits(model, probe.to(_input_device(model)), None).float()
    leak = (logits[1, 0] - logits[0, 0]).norm()
    forward = (logits[2, 1] - logits[0, 1]).norm()
    if leak > _LEAK * forward and leak > _ROUNDING * (logits[0, 0] - logits[0, 0].mean()).norm():
        raise ValueError(
            f"{type(model).__name__} is not causal here: its prediction for a token changes with the tokens after it, "
            "as an encoder's does; give a causal language model"
        )


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids `[n]` of a text, with the special tokens that the tokenizer puts around a text."""
    # verbose=False: the text is longer than the model's context, which is the point of the windows.
    encoded = tokenizer(text, return_tensors="pt", verbose=False)
    return encoded["input_ids"].view(-1)


def _flat_ids(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integer token ids, got {ids.dtype}")
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"ids must have the shape [n] or [1, n], got {list(ids.shape)}")
    return ids.detach().to("cpu", torch.int64)


def _check_model(model: nn.Module, ids: Tensor) -> None:
    """Refuse what would give a wrong number or an unreadable error."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("perplexity needs a causal language model; this one is an encoder-decoder")
    rows = _vocabulary(model)
    if rows is None:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise ValueError(
            f"the text holds the token id {low if low < 0 else high}, but the model's vocabulary has {rows} entries: "
            "is this the model's own tokenizer?"
        )


def _vocabulary(model: nn.Module) -> int | None:
    """Rows of the embedding table, or None for a model that does not say."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(table, "num_embeddings", None)


def _input_device(model: nn.Module) -> torch.device:
    """Where the ids go: the device of the first parameter that holds data (models split over devices start there)."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    # With offloading the first weights may rest on the host; the hooks move them and say where.
    hook = getattr(model, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return torch.device(execution if not isinstance(execution, int) else f"cuda:{execution}") if execution else device


def _batches(all_windows: Iterator[Window], batch_size: int) -> Iterator[list[Window]]:
    """Neighbouring windows of equal length that score equally many targets; no padding anywhere."""
    batch: list[Window] = []
    for window in all_windows:
        if batch and (
            len(batch) == batch_size
            or window.scored != batch[0].scored
            or window.end - window.begin != batch[0].end - batch[0].begin
        ):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _logits(model: nn.Module, inputs: Tensor, keep: int | None) -> Tensor:
    """Logits `[b, n, vocabulary]`, or of the last `keep` positions where the model can leave out the others."""
    kwargs: dict[str, Any] = {"use_cache": False} if hasattr(model, "config") else {}
    if keep is not None:
        kwargs["logits_to_keep"] = keep
    output = model(input_ids=inputs, **kwargs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[0] != inputs.shape[0]:
        raise ValueError(f"{type(model).__name__} gives no logits for every token: it is not a causal language model")
    return logits


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over `logits [b, n, vocabulary]` and `targets [b, n]`, softmax in fp32, sum in fp64."""
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    step = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    parts = [
        F.cross_entropy(logits[i : i + step].float(), targets[i : i + step], reduction="none").double().sum()
        for i in range(0, targets.numel(), step)
    ]
    return torch.stack(parts).sum()
