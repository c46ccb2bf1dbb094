"""A diffusers pipeline with quantized transformer and text encoders: load, run, save, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import kbit
from tests.integrations.dropin.harness import run_file
from tests.integrations.tiny_models import assert_same_bits, quantized, run_python

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

WIDTH = 64
ABSENT = dict.fromkeys(("tokenizer", "text_encoder_2", "tokenizer_2", "tokenizer_3"))
DROP_IN = Path(__file__).parent / "dropin_diffusers.py"


def transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=16,
    )


def pipeline() -> Any:
    """Stable Diffusion 3 in miniature: random weights; prompts come as ids, so it needs no tokenizers."""
    model = transformer()
    clip = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=WIDTH,
        intermediate_size=100,  # not a multiple of the block size
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        max_position_embeddings=32,
    )
    t5 = transformers.T5Config(vocab_size=99, d_model=WIDTH, d_ff=96, d_kv=16, num_layers=2, num_heads=4)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,), in_channels=3, out_channels=3, latent_channels=4, shift_factor=0.0, scaling_factor=1.0
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=transformers.CLIPTextModelWithProjection(clip),
        text_encoder_3=transformers.T5EncoderModel(t5),
        **ABSENT,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "sd3"
    pipeline().save_pretrained(folder)
    return folder


def load(path: Path, config: Any = None, **kwargs: Any) -> Any:
    options = {} if config is None else {"quantization_config": config}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(path, dtype=torch.float32, **ABSENT, **options, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any) -> torch.Tensor:
    """The whole way: two text encoders, two steps of the transformer, the latents."""
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        clip = pipe.text_encoder(ids)
        prompt = torch.cat([clip.last_hidden_state, pipe.text_encoder_3(ids).last_hidden_state], dim=1)
        return pipe(
            prompt_embeds=prompt,
            pooled_prompt_embeds=clip.text_embeds,
            guidance_scale=1.0,
            num_inference_steps=2,
            height=8,
            width=8,
            latents=torch.randn(1, 4, 8, 8, generator=seeded()),  # a VAE of one block does not scale
            output_type="latent",
        ).images


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def formats(model: Any) -> set[str]:
    return {module.weight_format.label for module in quantized(model).values()}


def test_granular_config_quantizes_each_component_as_told_and_saves(path: Path, tmp_path: Path) -> None:
    config = diffusers.PipelineQuantizationConfig(
        quant_mapping={
            "transformer": kbit.KbitConfig(bits=4, double_quant=False),
            "text_encoder": kbit.KbitConfig(bits=8),
            "text_encoder_3": kbit.KbitConfig(bits=4),
        }
    )
    plain, pipe = load(path), load(path, config)
    assert formats(pipe.transformer) == {"nf4-plain"} and len(quantized(pipe.transformer)) >= 20
    assert formats(pipe.text_encoder) == {"int8"} and formats(pipe.text_encoder_3) == {"nf4"}
    assert not quantized(pipe.vae)

    # Quantized while loading is quantized afterwards, to the bit.
    expected = kbit.quantize_model(plain.transformer, kbit.KbitConfig(bits=4, double_quant=False))
    assert_same_bits(pipe.transformer, expected)

    output, reference = run(pipe), run(load(path))
    assert torch.isfinite(output).all()
    assert 0 < (output - reference).norm() / reference.norm() < 0.2

    pipe.save_pretrained(tmp_path / "q")
    saved = json.loads((tmp_path / "q" / "transformer" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "kbit" and saved["quantization_config"]["bits"] == 4
    again = load(tmp_path / "q")
    for name in ("transformer", "text_encoder", "text_encoder_3"):
        assert_same_bits(getattr(again, name), getattr(pipe, name))
        one, two = quantized(getattr(again, name)), quantized(getattr(pipe, name))
        assert {n: m.weight_dtype for n, m in one.items()} == {n: m.weight_dtype for n, m in two.items()}
    assert torch.equal(run(again), output)
    # And the second generation of the checkpoint is the first, byte by byte.
    again.save_pretrained(tmp_path / "q2")
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "q2" / name).read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_backend_by_name(path: Path, bits: int) -> None:
    config = diffusers.PipelineQuantizationConfig(
        quant_backend="kbit", quant_kwargs={"bits": bits}, components_to_quantize=["transformer", "text_encoder"]
    )
    pipe = load(path, config)
    label = {4: "nf4", 8: "int8"}[bits]
    assert formats(pipe.transformer) == formats(pipe.text_encoder) == {label}
    assert not quantized(pipe.text_encoder_3)
    reference = run(load(path))
    assert (run(pipe) - reference).norm() / reference.norm() < {4: 0.2, 8: 0.03}[bits]


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 4, "format": "fp4", "block_size": 32}, {"bits": 8}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_model(path: Path, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype | None) -> None:
    config = kbit.KbitConfig(**options, skip_modules=["proj_out", "context_embedder"])
    cls = diffusers.SD3Transformer2DModel
    model = cls.from_pretrained(path / "transformer", quantization_config=config, torch_dtype=dtype)
    assert model.dtype == (dtype or torch.float32)
    assert type(model.proj_out) is torch.nn.Linear and type(model.context_embedder) is torch.nn.Linear
    layers = quantized(model)
    assert {m.weight_dtype for m in layers.values()} == {model.dtype}
    weights = sum(m.weight_shape.numel() for m in layers.values())
    assert kbit.model_memory(model).quantized < weights * (0.6 if options["bits"] == 4 else 1.1)

    model.save_pretrained(tmp_path / "q", max_shard_size="60KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 1
    for where in (None, {"": "cpu"}):
        assert_same_bits(cls.from_pretrained(tmp_path / "q", torch_dtype=dtype, device_map=where), model)

    other = cls.from_pretrained(
        tmp_path / "q", quantization_config=kbit.KbitConfig(bits=config.bits, compute_dtype="float16")
    )
    assert {m.compute_dtype for m in quantized(other).values() if isinstance(m, torch.nn.Linear)} == {torch.float16}
    with pytest.raises(ValueError, match=f"stored with bits={config.bits}"):
        cls.from_pretrained(tmp_path / "q", quantization_config=kbit.KbitConfig(bits=12 - config.bits))

    plain = model.dequantize()
    assert plain is model and not quantized(model) and type(model.transformer_blocks[0].attn.to_q) is torch.nn.Linear
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert_same_bits(cls.from_pretrained(tmp_path / "plain", torch_dtype=dtype), model)


def test_a_model_quantized_in_memory_saves_and_loads(tmp_path: Path) -> None:
    model = kbit.quantize_model(transformer(), kbit.KbitConfig(bits=4))
    model.save_pretrained(tmp_path / "q")
    again = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "q")
    assert quantized(again) and formats(again) == {"nf4"}
    assert_same_bits(again, model)
    assert not hasattr(kbit.dequantize_model(again), "quantization_method")


def test_peft_adapters_train_on_it(path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    model = diffusers.SD3Transformer2DModel.from_pretrained(
        path / "transformer", quantization_config=kbit.KbitConfig(bits=4)
    )
    kbit.prepare_for_training(model, gradient_checkpointing=False)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    inputs = model_inputs()
    target = torch.randn(1, 4, 8, 8, generator=seeded())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (model(**inputs).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert parameters and losses[-1] < losses[0]


def model_inputs() -> dict[str, torch.Tensor]:
    generator = seeded()
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, WIDTH, generator=generator),
        "pooled_projections": torch.randn(1, WIDTH, generator=generator),
        "timestep": torch.tensor([100]),
    }


def test_disk_offload_of_a_quantized_checkpoint(path: Path, tmp_path: Path) -> None:
    cls = diffusers.SD3Transformer2DModel
    where: dict[str, Any] = dict.fromkeys(
        ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks.0", "norm_out", "proj_out"), "cpu"
    )
    where["transformer_blocks.1"] = "disk"
    options = {"device_map": where, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match="straight to disk.*save_pretrained"):
        cls.from_pretrained(path / "transformer", quantization_config=kbit.KbitConfig(bits=4), **options)
    for bits in (4, 8):
        plain = cls.from_pretrained(path / "transformer", quantization_config=kbit.KbitConfig(bits=bits))
        plain.save_pretrained(tmp_path / f"q{bits}")
        model = cls.from_pretrained(tmp_path / f"q{bits}", **options)
        away = quantized(model.transformer_blocks[1])
        assert away and all(part.is_meta for layer in away.values() for part in layer.parts().values())
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(model(**model_inputs()).sample, plain(**model_inputs()).sample)
        model.save_pretrained(tmp_path / f"again{bits}")
        assert_same_bits(cls.from_pretrained(tmp_path / f"again{bits}"), plain)
        with pytest.raises(ValueError, match="offloaded"):
            model.dequantize()


def test_damaged_checkpoints_are_errors_that_name_the_key(path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    cls = diffusers.SD3Transformer2DModel
    cls.from_pretrained(path / "transformer", quantization_config=kbit.KbitConfig(bits=4)).save_pretrained(
        tmp_path / "q"
    )
    file = "diffusion_pytorch_model.safetensors"
    tensors = load_file(tmp_path / "q" / file)
    weight = "transformer_blocks.0.attn.to_q.weight"
    scales = weight.replace("weight", "absmax")
    lacking = {key: tensor for key, tensor in tensors.items() if key != scales}
    damages = {
        scales: lacking,
        weight: {**tensors, weight: tensors[weight][:-1].clone()},
        "proj_in_nowhere.absmax": {**tensors, "proj_in_nowhere.absmax": tensors[scales].clone()},
    }
    for key, changed in damages.items():
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "q", folder)
        save_file(changed, folder / file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            cls.from_pretrained(folder)


def test_what_cannot_be_quantized_is_named(path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    cls = diffusers.SD3Transformer2DModel
    shutil.copytree(path / "transformer", tmp_path / "bad")
    file = tmp_path / "bad" / "diffusion_pytorch_model.safetensors"
    good = load_file(file)
    key = "transformer_blocks.1.ff.net.2.weight"
    bad = {**good, key: torch.full_like(good[key], float("nan"))}
    save_file(bad, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        cls.from_pretrained(tmp_path / "bad", quantization_config=kbit.KbitConfig(bits=4))
    save_file({k: v for k, v in good.items() if k != key}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        cls.from_pretrained(tmp_path / "bad", quantization_config=kbit.KbitConfig(bits=4))


@pytest.mark.parametrize("first", ["kbit", "diffusers"])
def test_registered_whichever_is_imported_first(path: Path, tmp_path: Path, first: str) -> None:
    """In a new process, a checkpoint loads although nobody passed a KbitConfig."""
    cls = diffusers.SD3Transformer2DModel
    model = cls.from_pretrained(path / "transformer", quantization_config=kbit.KbitConfig(bits=4))
    model.save_pretrained(tmp_path / "q")
    second = {"kbit": "diffusers", "diffusers": "kbit"}[first]
    code = (
        f"import sys, {first}\n"
        f"if {first == 'kbit'}: assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules\n"
        f"import {second}\n"
        "from diffusers import SD3Transformer2DModel\n"
        "print(type(SD3Transformer2DModel.from_pretrained(sys.argv[1]).proj_out).__name__)\n"
    )
    done = run_python(code, str(tmp_path / "q"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Linear4bit"


def test_through_the_drop_in(path: Path, tmp_path: Path) -> None:
    """diffusers' and transformers' own BitsAndBytesConfig, with kbit as bitsandbytes."""
    output = run_file(DROP_IN, path, tmp_path)
    assert output.split()[-1] == "done"
