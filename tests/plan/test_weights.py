"""Planned bytes of weights against models that are really loaded and quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kbit
from kbit.plan import from_params, from_pretrained, plan_weights

pytest.importorskip("transformers")
pytestmark = pytest.mark.transformers

NAMES = ("llama", "llama-tied", "mistral", "gpt2", "opt", "bert-masked-lm", "bert", "t5", "t5-untied", "mixtral")


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_exact_for_every_format(save, name: str, embeddings: bool) -> None:  # type: ignore[no-untyped-def]
    """Not within 1%: to the byte."""
    cls, folder = save(name)
    skeleton = from_pretrained(folder)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    for label in ("int8", "nf4", "nf4-plain", "fp4"):
        config = kbit.KbitConfig.from_format(label, quantize_embeddings=embeddings)
        real = kbit.model_memory(kbit.quantize_model(cls.from_pretrained(folder, dtype=torch.bfloat16), config))
        planned = plan_weights(skeleton.model, config)
        assert planned.format == label
        assert (planned.quantized, planned.other, planned.buffers) == (real.quantized, real.other, real.buffers)


@pytest.mark.parametrize("label", ["int8", "nf4"])
def test_room_for_the_largest_weight_in_16_bits(label: str) -> None:
    """What a product of many tokens dequantizes, or int8 sets aside for many outlier columns: 112 MiB here."""
    skeleton = torch.nn.Sequential(*(torch.nn.Linear(k, n, device="meta") for n, k in ((14336, 4096), (4096, 4096))))
    assert plan_weights(skeleton.bfloat16(), label).largest == 112 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_what_loads(save, name: str) -> None:  # type: ignore[no-untyped-def]
    cls, folder = save(name)
    assert plan_weights(from_pretrained(folder).model, "bf16").total == kbit.model_memory(
        cls.from_pretrained(folder, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize("label", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5"])
def test_exact_for_a_model_quantized_while_loading(save, name: str, label: str) -> None:  # type: ignore[no-untyped-def]
    cls, folder = save(name)
    config = kbit.KbitConfig.from_format(label)
    model = cls.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    assert plan_weights(from_pretrained(folder).model, label).total == kbit.model_memory(model)


def test_skip_modules_and_block_size(save) -> None:  # type: ignore[no-untyped-def]
    cls, folder = save("llama")
    skeleton = from_pretrained(folder)
    for config in (
        kbit.KbitConfig(bits=4, skip_modules=[]),
        kbit.KbitConfig(bits=4, skip_modules=["mlp", "lm_head"]),
        kbit.KbitConfig(bits=4, block_size=256, double_quant=False),
    ):
        model = kbit.quantize_model(cls.from_pretrained(folder, dtype=torch.bfloat16), config)
        assert plan_weights(skeleton.model, config).total == kbit.model_memory(model)


def test_a_quantized_checkpoint_is_refused(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    cls, folder = save("llama")
    model = cls.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=kbit.KbitConfig(bits=4))
    model.save_pretrained(tmp_path / "quantized")
    with pytest.raises(ValueError, match=r"quantized already \(kbit\); plan the floating point model"):
        from_pretrained(str(tmp_path / "quantized"))


def test_config_without_architectures(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, folder = save("llama")
    config = json.loads((Path(folder) / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    assert type(from_pretrained(str(tmp_path / "bare")).model).__name__ == "LlamaForCausalLM"


def test_building_a_skeleton_leaves_the_default_dtype_alone(save) -> None:  # type: ignore[no-untyped-def]
    from_pretrained(save("llama")[1])
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"hidden_size": "wide"}, {"num_hidden_layers": None}])
def test_a_config_that_makes_no_model_is_a_value_error(save, tmp_path: Path, change: dict) -> None:  # type: ignore[no-untyped-def, type-arg]
    _, folder = save("llama")
    config = json.loads((Path(folder) / "config.json").read_text())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match="broken"):
        from_pretrained(str(tmp_path / "broken"))


@pytest.mark.parametrize("count", [2e6, 8e6, 125e6, 350e6, 1.1e9, 7e9, 13e9, 33e9, 70e9, 405e9])
def test_made_up_models_have_the_parameters_asked_for(count: float) -> None:
    skeleton = from_params(int(count))
    assert skeleton.parameters == pytest.approx(count, rel=0.01)
    shape = skeleton.shape
    # Proportions of a LLaMA: the MLP is two to four times as wide, and depth grows with width.
    assert 2 < shape.intermediate / shape.hidden < 4
    assert 30 < shape.hidden / shape.layers < 140
    nf4 = plan_weights(skeleton.model, "nf4")
    assert nf4.ratio == pytest.approx(4.127 / 16, rel=0.01)


def test_seven_billion_is_the_known_size() -> None:
    """bf16 is two bytes a parameter; the layers of a 7B model are about 3.5 GB in NF4, table and head stay."""
    skeleton = from_params(7_000_000_000)
    assert plan_weights(skeleton.model, "bf16").total == pytest.approx(14e9, rel=0.01)
    assert 3.8e9 < plan_weights(skeleton.model, "nf4").total < 4.1e9


def test_too_few_parameters() -> None:
    with pytest.raises(ValueError, match="fewer than any"):
        from_params(1000)
