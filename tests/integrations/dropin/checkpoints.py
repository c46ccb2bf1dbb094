"""write MODEL OUT: save MODEL in every format.  read FOLDER...: what its quantized weights decode to, as hashes.

Runs under either bitsandbytes. Prints one JSON object.
"""

import hashlib
import json
import sys

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


def decoded(module):
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {"version": bnb.__version__}
    if sys.argv[1] == "write":
        for kind, keywords in KINDS.items():
            model = AutoModelForCausalLM.from_pretrained(
                sys.argv[2],
                quantization_config=BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **keywords),
                device_map={"": "cpu"},
                torch_dtype=torch.bfloat16,
            )
            model.save_pretrained(f"{sys.argv[3]}/{kind}")
    else:
        for folder in sys.argv[2:]:
            model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, torch_dtype=torch.bfloat16)
            kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
            layers = {name: decoded(m) for name, m in model.named_modules() if isinstance(m, kinds)}
            bytes_of = {name: w.contiguous().view(torch.uint8).numpy().tobytes() for name, w in layers.items()}
            result[folder] = {name: hashlib.sha256(data).hexdigest() for name, data in bytes_of.items()}
    print(json.dumps(result))
