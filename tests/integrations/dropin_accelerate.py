"""accelerate's own bitsandbytes support, and its offloading of bitsandbytes' layers, with kbit as bitsandbytes.

Usage: dropin_accelerate.py MODEL SCRATCH
"""

import copy
import sys
from pathlib import Path

import accelerate
import bitsandbytes as bnb
import torch
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

assert bnb.__version__.endswith("+kbit")
torch.set_num_threads(1)
MODEL, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
DEVICE = 0 if torch.cuda.is_available() else "cpu"


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 15)[None].to(DEVICE)).logits.float()


def layers(model):
    return [m for m in model.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]


plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).to(DEVICE)
expected = logits(plain)

# An empty model, weights from a folder, and what is kept out of it.
with accelerate.init_empty_weights():
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL))
config = BnbQuantizationConfig(load_in_8bit=True, torch_dtype="bf16", skip_modules=["lm_head", "model.layers.1.mlp"])
model = load_and_quantize_model(
    copy.deepcopy(empty), config, weights_location=str(MODEL / "model.safetensors"), device_map={"": DEVICE}
)
assert len(layers(model)) == 11 and type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
assert (logits(model) - expected).norm() / expected.norm() < 0.03

# Quantized by accelerate, saved by accelerate, loaded by accelerate: which on a CPU fails inside accelerate, with every
# bitsandbytes (it moves the scales of a weight before it has set them), and nothing is loaded.
accelerate.Accelerator(cpu=DEVICE == "cpu").save_model(model, str(SCRATCH / "saved"))
try:
    again = load_and_quantize_model(
        copy.deepcopy(empty), config, weights_location=str(SCRATCH / "saved"), device_map={"": DEVICE}
    )
except AttributeError as error:
    assert DEVICE == "cpu" and "'NoneType' object has no attribute 'to'" in str(error)
else:
    assert torch.equal(logits(again), logits(model)), "loaded again"

# Layers of bitsandbytes go to memory and to disk, and work from there.
for name, settings in (
    ("4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    ("8bit", {"load_in_8bit": True}),
):
    for where in ("cpu", "disk"):
        model = AutoModelForCausalLM.from_pretrained(
            MODEL, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16, device_map={"": DEVICE}
        )
        before = logits(model)
        accelerate.hooks.remove_hook_from_submodules(model)
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device(DEVICE))
        else:
            accelerate.disk_offload(model, str(SCRATCH / name), execution_device=torch.device(DEVICE))
        assert all(p.is_meta for layer in layers(model) for p in layer.parameters(recurse=False))
        for _ in range(2):
            assert torch.equal(logits(model), before), (name, where)
        print("offloaded", name, where)
print("done")
