"""QLoRA as its tutorials have it: a 4-bit base, LoRA adapters, Trainer with a paged 8-bit optimizer, then a merge.

Nothing in here knows kbit:  kbit run examples/dropin/qlora.py MODEL
"""

import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

path, output = sys.argv[1], tempfile.mkdtemp()
config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def load_base():
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="auto")


model = prepare_model_for_kbit_training(load_base())
lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
model = get_peft_model(model, lora)
model.print_trainable_parameters()

ids = torch.arange(3, 19)
data = [{"input_ids": ids, "labels": ids} for _ in range(32)]
arguments = TrainingArguments(
    output_dir=output,
    per_device_train_batch_size=4,
    num_train_epochs=3,
    learning_rate=1e-2,
    optim="paged_adamw_8bit",
    logging_steps=1,
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert float(losses[-1]) < float(losses[0]), losses
model.save_pretrained(output)

# The adapter on a fresh base, merged into its 4-bit weights.
merged = PeftModel.from_pretrained(load_base(), output).merge_and_unload()
print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}; merged model: {type(merged).__name__}")
