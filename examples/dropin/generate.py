"""Load a model in 8 and in 4 bits through transformers' BitsAndBytesConfig, and generate.

Nothing in here knows kbit:  kbit run examples/dropin/generate.py MODEL
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

path = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = tokenizer("tell me a story", return_tensors="pt")
configs = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0),
    "4 bits": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
}
for name, config in configs.items():
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="auto")
    inputs = {key: prompt[key].to(model.device) for key in ("input_ids", "attention_mask")}
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    print(f"{name}, {model.get_memory_footprint() / 1e6:.1f} MB: {tokenizer.decode(tokens[0])}")
