"""A diffusers pipeline quantized with BitsAndBytesConfig, with kbit as bitsandbytes. Asserts inside.

Usage: dropin_diffusers.py PIPELINE SCRATCH
"""

import sys
from pathlib import Path

import bitsandbytes as bnb
import diffusers
import torch
import transformers
from diffusers import PipelineQuantizationConfig, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.quantizers.bitsandbytes import bnb_quantizer

assert bnb.__version__.endswith("+kbit")
torch.set_num_threads(1)
PATH, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)
INPUTS = {
    "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
    "encoder_hidden_states": torch.randn(1, 5, 64, generator=generator),
    "pooled_projections": torch.randn(1, 64, generator=generator),
    "timestep": torch.tensor([100]),
}


def sample(model):
    with torch.no_grad():
        return model(**{name: value.to(DEVICE) for name, value in INPUTS.items()}).sample.cpu()


def layers(model):
    return [m for m in model.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]


# Text encoders are transformers models: nothing is in the way on a CPU.
config = PipelineQuantizationConfig(
    quant_mapping={
        "text_encoder": transformers.BitsAndBytesConfig(load_in_8bit=True),
        "text_encoder_3": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    }
)
absent = dict.fromkeys(("tokenizer", "text_encoder_2", "tokenizer_2", "tokenizer_3"))
pipe = StableDiffusion3Pipeline.from_pretrained(PATH, quantization_config=config, torch_dtype=torch.float32, **absent)
assert layers(pipe.text_encoder) and layers(pipe.text_encoder_3) and not layers(pipe.transformer)
ids = torch.arange(3, 15)[None].to(pipe.text_encoder.device)
with torch.no_grad():
    assert torch.isfinite(pipe.text_encoder(ids).text_embeds).all()
    assert torch.isfinite(pipe.text_encoder_3(ids).last_hidden_state).all()

# diffusers refuses its own models on a machine without a GPU, whatever bitsandbytes can do there ...
four = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
eight = diffusers.BitsAndBytesConfig(load_in_8bit=True)
if DEVICE == "cpu":
    for refused in (four, eight):
        try:
            SD3Transformer2DModel.from_pretrained(PATH / "transformer", quantization_config=refused)
        except RuntimeError as error:
            assert "No GPU found" in str(error)
        else:
            raise AssertionError("diffusers quantized on a CPU: the rest of this script can be simpler now")
    # ... so that check, and nothing else of diffusers, is taken out to see everything behind it work.
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        quantizer.validate_environment = lambda self, *args, **kwargs: None

expected = sample(SD3Transformer2DModel.from_pretrained(PATH / "transformer").to(DEVICE))
for name, settings, tolerance in (("4bit", four, 0.2), ("8bit", eight, 0.03)):
    model = SD3Transformer2DModel.from_pretrained(
        PATH / "transformer", quantization_config=settings, torch_dtype=torch.float32, device_map={"": DEVICE}
    )
    assert len(layers(model)) >= 20
    found = sample(model)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < tolerance, (name, error)
    model.save_pretrained(SCRATCH / name)
    again = SD3Transformer2DModel.from_pretrained(SCRATCH / name, torch_dtype=torch.float32, device_map={"": DEVICE})
    assert len(layers(again)) == len(layers(model))
    assert torch.equal(sample(again), found), name
    print(name, round(error, 4))
print("done")
