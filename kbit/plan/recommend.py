"""The whole plan: every format's memory, what fits, what to take, and the Python that loads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kbit.config import KbitConfig
from kbit.plan import memory as mem
from kbit.plan.shape import Skeleton
from kbit.plan.weights import WeightPlan, linear_shapes, parameter_sizes, plan_weights

TABLE_FORMATS = ("bf16", "int8", "nf4-plain", "nf4", "fp4")
# What to prefer, best quality first. nf4-plain is left out: its scales cost 9% more and give nothing back.
_PREFERENCE = {
    "none": ("bf16", "int8", "nf4"),
    "lora": ("bf16", "int8", "nf4"),
    "qlora": ("nf4",),
    "full": ("bf16",),
}
_DEFAULT_CONTEXT = 4096
_LONGEST = 1 << 24


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is planned for. memory: bytes of the device. context: tokens of one sequence. rank: of LoRA adapters.

    Raises ValueError for a training mode, an optimizer or a number that does not exist.
    """

    memory: int
    train: str = "none"
    optimizer: str = "adamw8bit"
    context: int = _DEFAULT_CONTEXT
    batch: int = 1
    rank: int = 16
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        if self.train not in mem.TRAIN_MODES:
            raise ValueError(f"unknown training mode {self.train!r}; known: {', '.join(mem.TRAIN_MODES)}")
        for name in ("memory", "context", "batch", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        object.__setattr__(self, "optimizer", mem.Optimizer.parse(self.optimizer).name)


@dataclasses.dataclass(frozen=True)
class Row:
    """One format: its memory, whether it fits, and the longest context that would (None: not even one token).

    obstacle: why this format cannot be trained that way; None where it can.
    """

    format: str
    weights: WeightPlan
    memory: mem.Memory
    fits: bool
    max_context: int | None
    obstacle: str | None

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {**data, "weights": self.weights.to_json(), "memory": self.memory.to_json()}


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """What to take. fits: False where nothing does as asked; `text` then says what would. python: code to copy."""

    format: str | None
    context: int
    train: str
    fits: bool
    text: str
    python: str | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer of `kbit plan`. All sizes are bytes."""

    model: str
    parameters: int
    shape: Any
    settings: Settings
    rows: tuple[Row, ...]
    recommendation: Recommendation
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "shape": self.shape.to_json(),
            "settings": dataclasses.asdict(self.settings),
            "formats": [row.to_json() for row in self.rows],
            "recommendation": dataclasses.asdict(self.recommendation),
            "notes": list(self.notes),
        }


def default_context(skeleton: Skeleton) -> int:
    """4096 tokens, or what the model was made for if that is less."""
    return min(_DEFAULT_CONTEXT, skeleton.shape.max_context or _DEFAULT_CONTEXT)


def make_plan(
    skeleton: Skeleton, settings: Settings, formats: Sequence[str] = TABLE_FORMATS, name: str | None = None
) -> Plan:
    """Bytes of every format in `formats` under `settings`, and the recommendation.

    skeleton: from `kbit.plan.from_pretrained` or `kbit.plan.from_params`. name: what to call the model.
    """
    planner = _Planner(skeleton, formats)
    rows = planner.rows(settings)
    return Plan(
        model=name or skeleton.source or "a LLaMA",
        parameters=skeleton.parameters,
        shape=skeleton.shape,
        settings=settings,
        rows=rows,
        recommendation=_recommend(planner, settings, rows),
        notes=tuple(_notes(skeleton, settings, rows)),
    )


class _Planner:
    """Weights are counted once; the rest is arithmetic that is repeated for other contexts and training modes."""

    def __init__(self, skeleton: Skeleton, formats: Sequence[str]) -> None:
        self.skeleton = skeleton
        self.weights = {name: plan_weights(skeleton.model, name) for name in formats}
        self.linears = linear_shapes(skeleton.model)
        self.parameters = parameter_sizes(skeleton.model)

    def rows(self, settings: Settings) -> tuple[Row, ...]:
        return tuple(self.row(name, settings) for name in self.weights)

    def row(self, name: str, settings: Settings) -> Row:
        weights = self.weights[name]
        memory = self.memory(weights, settings)
        obstacle = None
        if settings.train == "full" and name != "bf16":
            obstacle = "quantized weights are frozen: train adapters on them (lora, qlora)"
        fits = obstacle is None and memory.total <= settings.memory
        return Row(name, weights, memory, fits, None if obstacle else self.longest(weights, settings), obstacle)

    def memory(self, weights: WeightPlan, settings: Settings) -> mem.Memory:
        shape, context, batch = self.skeleton.shape, settings.context, settings.batch
        optimizer = mem.Optimizer.parse(settings.optimizer)
        kv = adapter = gradients = states = 0
        if settings.train == "none":
            kv = mem.kv_cache(shape, context, batch)
            activations = mem.inference_activations(shape, context, batch, weights.largest)
        else:
            full = settings.train == "full"
            adapters = [] if full else self.linears
            sizes = self.parameters if full else mem.adapter_sizes(adapters, settings.rank)
            activations = mem.training_activations(
                shape,
                context,
                batch,
                checkpointing=settings.gradient_checkpointing,
                adapters=adapters,
                rank=settings.rank,
                workspace=weights.largest,
            )
            # PEFT keeps adapters, and so their gradients, in fp32; the whole model is trained in its own 16 bits.
            adapter = 0 if full else 4 * sum(sizes)
            gradients = (2 if full else 4) * sum(sizes)
            states = optimizer.nbytes(sizes)
        on_device = 0 if optimizer.paged else states
        overhead = mem.overhead(settings.memory, activations + gradients)
        return mem.Memory(
            weights.total, kv, activations, adapter, gradients, on_device, overhead, states if optimizer.paged else 0
        )

    def longest(self, weights: WeightPlan, settings: Settings) -> int | None:
        """The longest context that fits, up to what the model was made for."""

        def fits(context: int) -> bool:
            return self.memory(weights, dataclasses.replace(settings, context=context)).total <= settings.memory

        low, high = 0, self.skeleton.shape.max_context or _LONGEST
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low or None


def _recommend(planner: _Planner, settings: Settings, rows: Sequence[Row]) -> Recommendation:
    by_name = {row.format: row for row in rows}
    preferred = [by_name[name] for name in _PREFERENCE[settings.train] if name in by_name]
    for row in preferred:
        if row.fits:
            text = f"{row.format}: the best quality that fits"
            if settings.train == "lora" and row.format != "bf16":
                text += ", with adapters on quantized weights"
            if settings.train == "qlora":
                text = "nf4 with double quantization, as in QLoRA"
            return _take(planner, row.format, settings, True, text)

    # A shorter context helps where the weights fit, and is said for the best format for which that is much.
    for row in preferred:
        if row.max_context is not None and row.max_context >= min(512, settings.context):
            text = f"a context of {settings.context} does not fit; {row.format} fits up to {row.max_context} tokens"
            return _take(planner, row.format, dataclasses.replace(settings, context=row.max_context), False, text)
    for train in {"full": ("lora", "qlora"), "lora": ("qlora",)}.get(settings.train, ()):
        easier = dataclasses.replace(settings, train=train)
        for name in _PREFERENCE[train]:
            if name in planner.weights and planner.row(name, easier).fits:
                text = f"{settings.train} training does not fit; {train} with {name} weights does"
                return _take(planner, name, easier, False, text)
    if not preferred:
        return Recommendation(None, settings.context, settings.train, False, "none of these formats suits", None)
    least = min(preferred, key=lambda row: row.memory.total)
    text = f"nothing fits: {least.format} takes {least.memory.total / 1e9:.3g} GB of {settings.memory / 1e9:.3g} GB"
    if settings.train == "none":
        text += '; device_map="auto" puts the rest of the layers into main memory, which is slow'
        return _take(planner, least.format, settings, False, text)
    if settings.batch > 1 or settings.context > 512:
        text += "; try a smaller batch or context"
    return Recommendation(None, settings.context, settings.train, False, text, None)


def _take(planner: _Planner, name: str, settings: Settings, fits: bool, text: str) -> Recommendation:
    code = python_code(planner.skeleton, name, settings)
    return Recommendation(name, settings.context, settings.train, fits, text, code)


def config_code(format_name: str) -> str:
    """The shortest `KbitConfig(...)` that means this format."""
    config = KbitConfig.from_format(format_name)
    arguments = [f"bits={config.bits}"]
    if config.format == "fp4":
        arguments.append('format="fp4"')
    if not config.double_quant:
        arguments.append("double_quant=False")
    return f"KbitConfig({', '.join(arguments)})"


def python_code(skeleton: Skeleton, format_name: str, settings: Settings) -> str:
    """Python that loads the model in this format, ready for what was planned. It runs as it stands where the model is
    known by a path or a hub name."""
    quantized = format_name != "bf16"
    adapters = settings.train in ("lora", "qlora")
    arguments = [repr(skeleton.source or "PATH-OR-HUB-NAME"), f"dtype={skeleton.dtype}", 'device_map="auto"']
    lines = ["import torch"]
    if quantized or adapters:
        names = [*(["KbitConfig"] if quantized else []), *(["prepare_for_training"] if adapters else [])]
        lines.append(f"from kbit import {', '.join(names)}")
    if adapters:
        lines.append("from peft import LoraConfig, get_peft_model")
    lines.append(f"from transformers import {skeleton.loader}")
    if quantized:
        arguments.append(f"quantization_config={config_code(format_name)}")
    lines.append(f"model = {skeleton.loader}.from_pretrained({', '.join(arguments)})")
    if adapters:
        off = "" if settings.gradient_checkpointing else ", gradient_checkpointing=False"
        lines.append(f"model = prepare_for_training(model{off})")
        lines.append(f'model = get_peft_model(model, LoraConfig(r={settings.rank}, target_modules="all-linear"))')
    elif settings.train == "full" and settings.gradient_checkpointing:
        lines.append("model.gradient_checkpointing_enable()")
    return "\n".join(lines)


def _notes(skeleton: Skeleton, settings: Settings, rows: Sequence[Row]) -> list[str]:
    notes = []
    limit = skeleton.shape.max_context
    if limit is not None and settings.context > limit:
        notes.append(f"the model was made for {limit} tokens, fewer than the context of {settings.context}")
    if any(row.memory.host for row in rows):
        notes.append("paged optimizer states live in main memory and are not part of the total")
    if settings.train != "none" and not skeleton.shape.attention:
        notes.append("this model does not generate: activations are those of its encoder")
    if any(parameter.dim() == 3 for name, parameter in skeleton.model.named_parameters() if "expert" in name):
        notes.append("fused expert weights are not quantized yet and count in their own dtype")
    return notes
