"""QLoRA with transformers' Trainer: adapters over a 4-bit base, on the domain text that ships with kbit.

    python examples/native/finetune.py OUTPUT [STEPS]

Leaves the adapter in OUTPUT; examples/native/merge.py goes on from there.
"""

import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import kbit

output = sys.argv[1]
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 60
path = kbit.demo_model()
tokenizer = AutoTokenizer.from_pretrained(path)

base = AutoModelForCausalLM.from_pretrained(path, quantization_config=kbit.KbitConfig(bits=4), device_map="auto")
base = kbit.prepare_for_training(base, gradient_checkpointing=False)  # the model is small; True saves memory
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()


def blocks(name: str, length: int = 64) -> list[dict[str, list[int]]]:
    """A shipped text in pieces of `length` tokens."""
    text = (Path(kbit.__file__).parent / "assets" / name).read_text(encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    pieces = [ids[i : i + length] for i in range(0, len(ids) - length, length)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


arguments = TrainingArguments(
    output_dir=f"{output}/checkpoints",
    per_device_train_batch_size=4,
    per_device_eval_batch_size=8,
    max_steps=steps,
    learning_rate=3e-3,
    logging_steps=max(1, steps // 6),
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=blocks("domain_train.txt"),
    eval_dataset=blocks("domain_eval.txt")[:32],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"held-out loss {before:.3f} -> {after:.3f}")
assert after < before

model.save_pretrained(output)  # the adapter alone
tokenizer.save_pretrained(output)
