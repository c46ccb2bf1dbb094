"""Fine-tuning on a text: LoRA adapters on a quantized (QLoRA) or a 16-bit base, with transformers' Trainer.

What `kbit finetune` runs. A run lives in one folder: `run.json` (settings), `checkpoints/` (what a resumed run needs),
and at the end the adapter, `losses.json` and `loss.png`. The base model is never written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kbit.checkpoint.folder import check_writable
from kbit.config import KbitConfig
from kbit.eval.perplexity import check_causal
from kbit.integrations.peft import prepare_for_training

SETTINGS_FILE = "run.json"


@dataclasses.dataclass
class FinetuneSettings:
    """One run.

    model: folder or hub name. data: a .txt file (plain text) or a .jsonl file (one object a line, see `read_examples`).
    eval_data: held-out text in the same form; None holds out the last twentieth of `data`.
    method: "qlora" (base in `format`) or "lora" (base in bf16).
    steps: optimizer steps; None makes `epochs` passes over the data.
    context: tokens an example. batch: examples a step.
    targets: module names, comma-separated, or "all-linear". seed: of everything random.
    """

    model: str
    data: str
    output: str
    eval_data: str | None = None
    method: str = "qlora"
    format: str = "nf4"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all-linear"
    epochs: float = 1.0
    steps: int | None = None
    learning_rate: float = 2e-4
    context: int = 512
    batch: int = 4
    gradient_checkpointing: bool = False
    seed: int = 0

    def check(self) -> None:
        """ValueError for a setting that cannot work."""
        if self.method not in ("qlora", "lora"):
            raise ValueError(f"unknown method {self.method!r}; use qlora (quantized base) or lora (bf16 base)")
        for name in ("rank", "context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"the learning rate must be a positive number, got {self.learning_rate}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.steps is None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be a positive number, got {self.epochs}")
        KbitConfig.from_format(self.format)


@dataclasses.dataclass
class FinetuneResult:
    """What a run measured: mean held-out loss (nats a token) before and after, and what it took."""

    output: str
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    peak_bytes: int
    peak_of: str
    trainable_parameters: int
    losses: list[dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# ---- data ----


def read_examples(path: str, tokenizer: Any, context: int) -> list[dict[str, list[int]]]:
    """Token ids and labels of a text file, cut to `context` tokens.

    .jsonl: one object a line with "text"; or "prompt" and "completion" (the loss is on the completion alone); or
    "messages" (the tokenizer's chat template). Anything else is read as plain text and cut into consecutive pieces.
    Raises ValueError that names file and line.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if file.suffix == ".jsonl":
        examples = [
            _example(line, f"{path}, line {number}", tokenizer, context)
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip()
        ]
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [ids[begin : begin + context] for begin in range(0, len(ids), context)]
        examples = [{"input_ids": piece, "labels": list(piece)} for piece in pieces]
    examples = [example for example in examples if len(example["input_ids"]) > 1]
    if not examples:
        raise ValueError(f"{path} holds no text to train on")
    return examples


def _example(line: str, where: str, tokenizer: Any, context: int) -> dict[str, list[int]]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg})") from None
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    masked = 0
    if not isinstance(data, dict):
        raise ValueError(f"{where} is not an object")
    if isinstance(data.get("text"), str):
        ids = tokenizer(data["text"])["input_ids"] + end
    elif isinstance(data.get("prompt"), str) and isinstance(data.get("completion"), str):
        prompt = tokenizer(data["prompt"])["input_ids"]
        masked = len(prompt)
        ids = prompt + tokenizer(data["completion"], add_special_tokens=False)["input_ids"] + end
    elif isinstance(data.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{where} holds messages, but this model's tokenizer has no chat template")
        ids = tokenizer(tokenizer.apply_chat_template(data["messages"], tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
    else:
        raise ValueError(f'{where} has none of "text", "prompt" with "completion", or "messages"')
    if masked >= min(len(ids), context):
        raise ValueError(f"{where}: the prompt alone fills the context of {context} tokens; nothing is left to learn")
    return {"input_ids": ids[:context], "labels": ([-100] * masked + ids[masked:])[:context]}


def split(settings: FinetuneSettings, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Training and held-out examples."""
    train = read_examples(settings.data, tokenizer, settings.context)
    if settings.eval_data is not None:
        return train, read_examples(settings.eval_data, tokenizer, settings.context)
    held = max(1, len(train) // 20)
    if len(train) <= held:
        raise ValueError(f"{settings.data} is too short to hold out a part of it; give held-out text with --eval-data")
    return train[:-held], train[-held:]


# ---- the run ----


def finetune(
    settings: FinetuneSettings,
    resume: bool = False,
    on_step: Callable[[int, int, float | None], None] | None = None,
) -> FinetuneResult:
    """Train adapters as `settings` say and leave them in `settings.output`.

    resume: go on from the last checkpoint in that folder; the settings must be those of the run.
    on_step(step, total, loss): called after every optimizer step.

    Raises ValueError for settings that cannot work, and for an output folder that holds something (without `resume`).
    """
    settings.check()
    output = Path(settings.output)
    checkpoint = open_run(settings, output, resume)

    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.set_seed(settings.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    train, held_out = split(settings, tokenizer)

    model = load_base(settings)
    check_causal(model, torch.tensor(train[0]["input_ids"]))
    if not resume:  # not before: a run that could not begin leaves nothing in the way of the next one
        output.mkdir(parents=True, exist_ok=True)
        _write_json(output / SETTINGS_FILE, dataclasses.asdict(settings))
    prepare_for_training(model, gradient_checkpointing=settings.gradient_checkpointing)
    model.config.use_cache = False
    targets: Any = settings.targets if settings.targets == "all-linear" else settings.targets.split(",")
    model = get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    total = settings.steps or math.ceil(settings.epochs * math.ceil(len(train) / settings.batch))
    every = max(1, total // 10)
    arguments = transformers.TrainingArguments(
        output_dir=str(output / "checkpoints"),
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        max_steps=total,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, total // 10),
        logging_steps=max(1, total // 50),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[_reporter(on_step)],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    before = _first_loss(output) if checkpoint else None
    if before is None:
        before = trainer.evaluate()["eval_loss"]
        _write_json(output / "first_loss.json", {"loss": before})

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    after = trainer.evaluate()["eval_loss"]
    peak, peak_of = _peak_memory()

    losses = [
        {key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    losses.insert(0, {"step": 0, "eval_loss": before})
    _save_adapter(model, tokenizer, output)
    result = FinetuneResult(
        str(output), before, after, trainer.state.global_step, seconds, peak, peak_of, trainable, losses
    )
    _write_json(output / "losses.json", result.to_json())
    plot_losses(losses, output / "loss.png")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    (output / "first_loss.json").unlink(missing_ok=True)
    return result


def load_base(settings: FinetuneSettings) -> Any:
    """The frozen base: quantized while it loads (qlora), as its own checkpoint says, or in bf16 (lora).

    Reads safetensors only and runs no code of the model's folder. Raises ValueError for a model that is quantized
    already with method "lora", and for one that is no causal language model.
    """
    import transformers

    # trust_remote_code: left out, transformers asks on the terminal.
    config = transformers.AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "trust_remote_code": False, "use_safetensors": True}
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    if getattr(config, "quantization_config", None) is not None:
        if settings.method == "lora":
            raise ValueError(f"{settings.model} is quantized already; use --method qlora")
    elif settings.method == "qlora":
        options["quantization_config"] = KbitConfig.from_format(settings.format)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(settings.model, **options)
    except ValueError as error:
        if "AutoModelForCausalLM" in str(error) and "trust_remote_code" not in str(error):
            raise ValueError(f"{settings.model} is a {config.model_type} model, not a causal language model") from None
        raise


def open_run(settings: FinetuneSettings, output: Path, resume: bool) -> str | None:
    """Check that the output folder is free, or holds this run; the checkpoint to go on from, or None for a new run."""
    file = output / SETTINGS_FILE
    current = dataclasses.asdict(settings)
    if not resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            hint = "; --resume goes on with the run in it" if file.exists() else ""
            raise ValueError(f"{output} exists and is not empty; choose another folder{hint}")
        check_writable(output)
        return None
    if not file.is_file():
        raise ValueError(f"{output} holds no run to resume (no {SETTINGS_FILE})")
    if (output / "adapter_config.json").exists():
        raise ValueError(f"the run in {output} is finished; there is nothing to resume")
    saved = json.loads(file.read_text())
    changed = [name for name, value in current.items() if name != "output" and saved.get(name) != value]
    if changed:
        raise ValueError(
            f"the run in {output} was started with other settings: "
            + ", ".join(f"{name} {saved.get(name)!r}, not {current[name]!r}" for name in changed)
        )
    checkpoints = sorted((output / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    return str(checkpoints[-1]) if checkpoints else None


def _first_loss(output: Path) -> float | None:
    file = output / "first_loss.json"
    return json.loads(file.read_text())["loss"] if file.is_file() else None


def _reporter(on_step: Callable[[int, int, float | None], None] | None) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        last: float | None = None

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.last = (logs or {}).get("loss", self.last)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_step is not None:
                on_step(state.global_step, state.max_steps, self.last)

    return Reporter()


def _save_adapter(model: Any, tokenizer: Any, output: Path) -> None:
    """Adapter and tokenizer, written beside the run first: an interrupted save leaves the checkpoints in place."""
    temporary = output / ".adapter"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    # adapter_config.json marks a finished run, so it comes last.
    for file in sorted(temporary.iterdir(), key=lambda f: f.name == "adapter_config.json"):
        os.replace(file, output / file.name)
    temporary.rmdir()


def _write_json(file: Path, data: Any) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _peak_memory() -> tuple[int, str]:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "GPU"
    try:
        import resource
    except ImportError:  # Windows
        return 0, "process (not known on this system)"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"


def plot_losses(losses: list[dict[str, float]], file: Path) -> None:
    """Training and held-out loss against steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "held out", "o")):
        points = [(entry["step"], entry[key]) for entry in losses if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title="kbit finetune")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
    os.replace(temporary, file)
