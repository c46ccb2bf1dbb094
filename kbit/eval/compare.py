"""One model in several formats, measured the same way: bytes, perplexity, speed, a line of text, error by layer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kbit.config import KbitConfig
from kbit.eval.layer_error import LayerError, mean_error, quantized_layer_errors, quantized_modules
from kbit.eval.outliers import inject_outliers
from kbit.eval.perplexity import Perplexity, perplexity
from kbit.nn.convert import model_memory, quantize_model
from kbit.nn.select import select_experts, select_modules

BASELINE = "bf16"
_BF16_BYTES = 2


@dataclass
class FormatResult:
    """What one format gave.

    bytes: of all weights, each shared one once. ratio: to the same weights in bf16. quantized_bytes, quantized_ratio:
    of the layers that are quantized alone, scales included and shared codebooks not. perplexity_ratio: to bf16's, None
    where bf16 was not measured. tokens: how many were scored, in windows of `context` moved by `stride`.
    tokens_per_second: reading the text; generate_tokens_per_second: writing, one sequence. text: what the model wrote
    after the prompt. layer_errors: relative squared error of each quantized weight.
    """

    format: str
    bytes: int
    ratio: float
    quantized_bytes: int
    quantized_ratio: float
    perplexity: float
    tokens: int
    context: int
    stride: int
    tokens_per_second: float
    perplexity_ratio: float | None = None
    generate_tokens_per_second: float | None = None
    text: str = ""
    layer_errors: list[LayerError] = field(default_factory=list)

    @property
    def mean_error(self) -> float | None:
        return mean_error(self.layer_errors) if self.layer_errors else None

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "mean_error": self.mean_error}


@dataclass
class OutlierResult:
    """Perplexity of one case after outlier features were put into the model.

    name: of the case. ratio: to the perplexity of that model in bf16. tokens: how many were scored.
    """

    name: str
    perplexity: float
    ratio: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights now and in bf16, in all and of the layers that are or would be quantized."""

    total: int
    total_bf16: int
    quantized: int
    quantized_bf16: int


def sizes(model: nn.Module, config: KbitConfig | None = None) -> Sizes:
    """The sizes of a model. config: for a floating point model, which layers count as the quantized ones."""
    elements = {name: module.weight_shape.numel() for name, module in quantized_modules(model)}
    memory = model_memory(model)
    if elements:
        reference = _BF16_BYTES * sum(elements.values())
        others = _BF16_BYTES * _other_elements(model)
        return Sizes(memory.quantized + memory.other, reference + others, memory.quantized, reference)
    chosen = select_modules(model, config or KbitConfig())
    weights: dict[int, Tensor] = {id(m.weight): m.weight for m in chosen.values()}  # type: ignore[misc]
    fused = select_experts(model, config or KbitConfig()).values()
    weights |= {id(p): p for p in (experts.get_parameter(name) for experts, name in fused)}
    quantized = sum(weight.nbytes for weight in weights.values())
    reference = _BF16_BYTES * sum(weight.numel() for weight in weights.values())
    return Sizes(memory.other, _BF16_BYTES * _other_elements(model), quantized, reference)


def _other_elements(model: nn.Module) -> int:
    """Elements of all parameters that are not parts of a quantized weight."""
    parts = {id(part) for _, module in quantized_modules(model) for part in module.parts().values()}
    return sum(p.numel() for p in model.parameters() if id(p) not in parts)


def measure(
    model: nn.Module,
    ids: Tensor,
    format_name: str,
    *,
    generate: Callable[[nn.Module], tuple[str, int]] | None = None,
    reference: Callable[[str], Tensor | None] | None = None,
    **perplexity_args: Any,
) -> FormatResult:
    """Measure a loaded model. ids: the tokenized text.

    generate: writes a line with the model and returns it with its number of tokens; it is timed, after
    the text has warmed the model up. reference: reads the floating point weight of a module (see
    `quantized_layer_errors`).
    """
    size = sizes(model)
    errors = quantized_layer_errors(model, reference) if reference is not None else []
    result: Perplexity = perplexity(model, ids, **perplexity_args)
    row = FormatResult(
        format=format_name,
        bytes=size.total,
        ratio=size.total / size.total_bf16,
        quantized_bytes=size.quantized,
        quantized_ratio=size.quantized / size.quantized_bf16 if size.quantized_bf16 else 1.0,
        perplexity=result.value,
        tokens=result.tokens,
        context=result.context,
        stride=result.stride,
        tokens_per_second=result.tokens_per_second,
        layer_errors=errors,
    )
    if generate is not None:
        started = time.perf_counter()
        row.text, count = generate(model)
        seconds = time.perf_counter() - started
        row.generate_tokens_per_second = count / seconds if seconds > 0 else None
    return row


def relate_to_baseline(rows: Iterable[FormatResult]) -> None:
    """Fill in `perplexity_ratio` where bf16 was measured too."""
    rows = list(rows)
    baseline = next((row for row in rows if row.format == BASELINE), None)
    if baseline is not None:
        for row in rows:
            row.perplexity_ratio = row.perplexity / baseline.perplexity


OUTLIER_CASES = (
    ("bf16", None),
    ("int8, no threshold", KbitConfig(bits=8, outlier_threshold=0.0)),
    ("int8, threshold 6", KbitConfig(bits=8, outlier_threshold=6.0)),
)


def compare_outliers(
    load: Callable[[], nn.Module],
    ids: Tensor,
    *,
    step: Callable[[str], None] | None = None,
    count: int = 1,
    exponent: int = 6,
    **perplexity_args: Any,
) -> list[OutlierResult]:
    """Put outlier features into a model and measure it in bf16, in plain int8 and in LLM.int8().

    load: gives a fresh floating point model. step: called with the name of each case before it is measured. count,
    exponent: see `inject_outliers`. Raises ValueError for a model that outliers cannot be put into.
    """
    results: list[OutlierResult] = []
    for name, config in OUTLIER_CASES:
        if step is not None:
            step(name)
        model = load()
        inject_outliers(model, count, exponent)
        if config is not None:
            model = quantize_model(model, config)
        with torch.no_grad():
            result = perplexity(model, ids, **perplexity_args)
        baseline = results[0].perplexity if results else result.value
        results.append(OutlierResult(name, result.value, result.value / baseline, result.tokens))
        del model
    return results
