"""Merge an adapter: into a floating point model for any tool, and into the 4-bit codes.

    python examples/native/merge.py ADAPTER OUTPUT

Writes OUTPUT/merged (bf16) and OUTPUT/merged-nf4.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbit

adapter, output = sys.argv[1], Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(adapter)
inputs = tokenizer("The package manager", return_tensors="pt")


def load():
    """The adapter on a fresh 4-bit base."""
    base = AutoModelForCausalLM.from_pretrained(kbit.demo_model(), quantization_config=kbit.KbitConfig(bits=4))
    return PeftModel.from_pretrained(base, adapter).eval()


def logits(model):
    with torch.no_grad():
        return model(**inputs).logits.float()


model = load()
expected = logits(model)


def error(other):
    return float((logits(other) - expected).norm() / expected.norm())


# dequantize(W) + BA, rounded once: what the adapter learned is kept.
merged = kbit.merge_adapters(load())
merged.save_pretrained(output / "merged")
tokenizer.save_pretrained(output / "merged")
print(f"merged into {merged.dtype}: {kbit.model_memory(merged) / 1e6:.1f} MB, logits off by {error(merged):.2%}")
assert error(merged) < 0.02

# quantize(dequantize(W) + BA): as small as the base, at the price of a second rounding to 4 bits.
small = kbit.merge_adapters(load(), dequantize=False)
small.save_pretrained(output / "merged-nf4")
tokenizer.save_pretrained(output / "merged-nf4")
print(f"merged into nf4: {kbit.model_memory(small) / 1e6:.1f} MB, logits off by {error(small):.2%}")

# Both load like any model.
for name in ("merged", "merged-nf4"):
    again = AutoModelForCausalLM.from_pretrained(output / name, dtype="auto")
    print(name, tokenizer.decode(again.generate(**inputs, max_new_tokens=12, do_sample=False)[0]))

# And merging can be undone, to the bit.
model.merge_adapter()
model.unmerge_adapter()
assert torch.equal(logits(model), expected)
