"""The losses of 50 QLoRA steps, as JSON.  curve.py MODEL native|bitsandbytes

"bitsandbytes" is whichever is on the path: kbit's drop-in or the real one. Model, adapters and data are the same.
"""

import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
path, way = sys.argv[1:]
if way == "native":
    import kbit

    config = kbit.KbitConfig(bits=4)
else:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
model = AutoModelForCausalLM.from_pretrained(
    path, quantization_config=config, device_map="cpu", torch_dtype=torch.float32
)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
if way == "native":
    model = kbit.prepare_for_training(model, gradient_checkpointing=False)
else:
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, lora)
model.train()
# The same adapters everywhere, however many random numbers went before.
generator = torch.Generator().manual_seed(3)
for name, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
    with torch.no_grad():
        p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if "lora_A" in name else 0.0))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
losses = []
for _ in range(50):
    start = torch.randint(0, 100, (4, 1), generator=generator)
    ids = (start % 4 + torch.arange(24) * 3) % 128
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
print(json.dumps(losses))
