"""What fits, what is recommended, and that the Python in the answer runs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import kbit
from kbit.plan import Settings, default_context, from_params, from_pretrained, make_plan
from kbit.plan.recommend import config_code

GB = 10**9


@pytest.fixture(scope="module")
def seven():  # type: ignore[no-untyped-def]
    return from_params(7 * 10**9)


@pytest.mark.parametrize(("memory", "expected"), [(80, "bf16"), (18, "bf16"), (12, "int8"), (8, "nf4"), (7.5, "nf4")])
def test_the_best_quality_that_fits(seven, memory: float, expected: str) -> None:  # type: ignore[no-untyped-def]
    plan = make_plan(seven, Settings(memory=int(memory * GB)))
    assert (plan.recommendation.format, plan.recommendation.fits) == (expected, True)
    row = next(row for row in plan.rows if row.format == expected)
    assert row.fits and row.memory.total <= memory * GB


def test_qlora_of_7b_fits_into_12_gb_and_full_training_does_not(seven) -> None:  # type: ignore[no-untyped-def]
    qlora = make_plan(seven, Settings(memory=12 * GB, train="qlora"))
    assert qlora.recommendation.format == "nf4" and qlora.recommendation.fits
    full = make_plan(seven, Settings(memory=12 * GB, train="full"))
    assert not full.recommendation.fits
    assert full.recommendation.train in ("lora", "qlora") and "prepare_for_training" in (
        full.recommendation.python or ""
    )
    # Weights, gradients and two fp32 states: about 12 bytes a parameter with 32-bit AdamW.
    bf16 = make_plan(seven, Settings(memory=12 * GB, train="full", optimizer="adamw")).rows[0].memory
    assert bf16.weights + bf16.gradients + bf16.optimizer == pytest.approx(12 * 7e9, rel=0.01)


def test_quantized_formats_cannot_be_trained_in_full(seven) -> None:  # type: ignore[no-untyped-def]
    rows = make_plan(seven, Settings(memory=1000 * GB, train="full")).rows
    assert [row.format for row in rows if row.fits] == ["bf16"]
    assert all("frozen" in row.obstacle for row in rows if row.format != "bf16")


def test_paged_states_leave_the_device(seven) -> None:  # type: ignore[no-untyped-def]
    plain = make_plan(seven, Settings(memory=80 * GB, train="full", optimizer="adamw8bit")).rows[0].memory
    paged = make_plan(seven, Settings(memory=80 * GB, train="full", optimizer="paged-adamw8bit"))
    assert paged.rows[0].memory.host == plain.optimizer
    assert paged.rows[0].memory.total == plain.total - plain.optimizer
    assert any("main memory" in note for note in paged.notes)


@pytest.mark.parametrize("train", ["none", "qlora"])
def test_longest_context_is_the_longest_that_fits(seven, train: str) -> None:  # type: ignore[no-untyped-def]
    settings = Settings(memory=12 * GB, train=train)
    for row in make_plan(seven, settings).rows:
        if row.max_context is None:
            continue
        at = make_plan(seven, dataclasses.replace(settings, context=row.max_context), [row.format]).rows[0]
        above = make_plan(seven, dataclasses.replace(settings, context=row.max_context + 1), [row.format]).rows[0]
        assert at.fits and not above.fits


def test_a_context_that_does_not_fit_is_answered_with_one_that_does(seven) -> None:  # type: ignore[no-untyped-def]
    advice = make_plan(seven, Settings(memory=12 * GB, context=500_000)).recommendation
    assert not advice.fits and "does not fit" in advice.text
    assert advice.format is not None
    again = make_plan(seven, Settings(memory=12 * GB, context=advice.context), [advice.format])
    assert again.rows[0].fits


def test_nothing_fits_says_what_is_missing() -> None:
    advice = make_plan(from_params(70 * 10**9), Settings(memory=8 * GB)).recommendation
    assert not advice.fits
    assert "nothing fits: nf4 takes" in advice.text and "device_map" in advice.text


def test_memory_grows_with_batch_and_rank(seven) -> None:  # type: ignore[no-untyped-def]
    base = Settings(memory=100 * GB, train="qlora")
    row = make_plan(seven, base, ["nf4"]).rows[0].memory
    wide = make_plan(seven, dataclasses.replace(base, batch=2, rank=32), ["nf4"]).rows[0].memory
    assert wide.adapter == 2 * row.adapter and wide.gradients == 2 * row.gradients
    assert wide.activations > 1.8 * row.activations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "dpo"}, "unknown training mode 'dpo'"),
        ({"optimizer": "adamx"}, "unknown optimizer"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"context": -1}, "context must be at least 1"),
        ({"memory": 0}, "memory must be at least 1"),
    ],
)
def test_settings_are_checked(change: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        Settings(**{"memory": GB, **change})


def test_json_is_complete(seven) -> None:  # type: ignore[no-untyped-def]
    data = json.loads(json.dumps(make_plan(seven, Settings(memory=12 * GB, train="qlora")).to_json()))
    assert [row["format"] for row in data["formats"]] == ["bf16", "int8", "nf4-plain", "nf4", "fp4"]
    memory = data["formats"][3]["memory"]
    parts = sum(value for key, value in memory.items() if key not in ("total", "host"))
    assert parts == memory["total"]
    assert data["recommendation"]["format"] == "nf4"


@pytest.mark.parametrize("label", ["int8", "nf4", "nf4-plain", "fp4", "fp4-plain"])
def test_config_code_means_the_format(label: str) -> None:
    config = eval(config_code(label), {"KbitConfig": kbit.KbitConfig})
    assert config.weight_format.label == label


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("name", "train", "label"),
    [
        ("llama-tied", "none", "bf16"),
        ("llama-tied", "none", "int8"),
        ("llama-tied", "none", "nf4"),
        ("llama-tied", "qlora", "nf4"),
        ("llama-tied", "lora", "bf16"),
        ("llama-tied", "full", "bf16"),
        ("gpt2", "qlora", "nf4"),
        ("bert-masked-lm", "none", "int8"),
        ("t5", "none", "nf4"),
    ],
)
def test_the_recommended_python_runs(save, name: str, train: str, label: str) -> None:  # type: ignore[no-untyped-def]
    """And gives a model with the planned weights, that computes, and learns where it was planned to."""
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    _, folder = save(name)
    skeleton = from_pretrained(folder)
    settings = Settings(memory=GB, train=train, context=default_context(skeleton))
    plan = make_plan(skeleton, settings, [label])
    assert plan.recommendation.fits and plan.recommendation.format == label and plan.recommendation.python
    scope: dict[str, object] = {}
    exec(plan.recommendation.python, scope)
    model = scope["model"]
    trainable = [p for p in model.parameters() if p.requires_grad]  # type: ignore[attr-defined]
    planned = plan.rows[0].memory
    assert kbit.model_memory(model) == planned.weights + planned.adapter  # type: ignore[arg-type]
    ids = torch.randint(5, 500, (1, 8))
    out = model(input_ids=ids, labels=ids)  # type: ignore[operator]
    assert torch.isfinite(out.loss)
    if train != "none":
        model.train()  # type: ignore[attr-defined]
        model(input_ids=ids, labels=ids).loss.backward()  # type: ignore[operator]
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainable)
        assert sum(p.grad.nbytes for p in trainable if p.grad is not None) == planned.gradients


def test_default_context_respects_the_model(save) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    assert default_context(from_pretrained(save("gpt2")[1])) == 128
    assert default_context(from_params(7 * 10**9)) == 4096
