"""Load the shipped model in 4 bits, write with it, save it, and load what was saved.

    python examples/native/load.py [MODEL]

MODEL is a folder or a hub name; the model that ships with kbit stands in for it.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbit

path = sys.argv[1] if len(sys.argv) > 1 else kbit.demo_model()
tokenizer = AutoTokenizer.from_pretrained(path)
plain = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=kbit.KbitConfig(bits=4), device_map="auto")

before, after = kbit.model_memory(plain), kbit.model_memory(model)
print(f"{plain.dtype}: {before / 1e6:.1f} MB; nf4: {after / 1e6:.1f} MB, {after.quantized / 1e6:.1f} of them codes")

inputs = tokenizer("The package manager", return_tensors="pt").to(model.device)
written = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")  # quantized, without being told
    with torch.no_grad():
        same = torch.equal(again(**inputs).logits, model(**inputs).logits)
print("loaded again, equal to the bit:", same)
assert same
