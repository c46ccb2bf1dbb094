"""Fifty steps of QLoRA in fp32 on a CPU, through kbit itself or through whatever is called bitsandbytes.

Usage: loss_curve.py MODEL native|bitsandbytes plain|double
Prints one JSON object: which library did it, and the loss of every step.
"""

import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

STEPS, BATCH, LENGTH = 50, 4, 16


def batches(vocabulary):
    """Four batches over and over: what they hold can be learnt by heart, so the losses fall far."""
    generator = torch.Generator().manual_seed(7)
    pool = [torch.randint(3, vocabulary, (BATCH, LENGTH), generator=generator) for _ in range(4)]
    for step in range(STEPS):
        yield pool[step % len(pool)]


def load_native(path, double):
    import kbit

    config = kbit.KbitConfig(bits=4, double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    return kbit.prepare_for_training(model, gradient_checkpointing=False), f"kbit {kbit.__version__}"


def load_bitsandbytes(path, double):
    import bitsandbytes
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model, f"bitsandbytes {bitsandbytes.__version__}"


def main():
    path, way, scales = sys.argv[1:4]
    torch.set_num_threads(1)
    model, library = {"native": load_native, "bitsandbytes": load_bitsandbytes}[way](path, scales == "double")
    torch.manual_seed(0)  # adapters start equal
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for ids in batches(model.config.vocab_size):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(json.dumps({"library": library, "losses": losses}))


if __name__ == "__main__":
    main()
