"""QLoRA in a plain loop, in transformers' Trainer and TRL's: it learns, it resumes, it does what bitsandbytes does."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import kbit
from kbit.nn.base import QuantizedModule
from tests.integrations import tiny_models as tiny
from tests.integrations.dropin.harness import llama, run_file, save_llama

peft = pytest.importorskip("peft", reason="the peft extra is not installed")
transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

pytestmark = pytest.mark.transformers
CURVE = Path(__file__).parent / "loss_curve.py"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a word tokenizer; its head is large enough for losses to fall far below log(vocabulary)."""
    folder = save_llama(tmp_path_factory.mktemp("model"))
    llama(initializer_range=0.1).float().save_pretrained(folder)
    return folder


def qlora(path: Path, seed: int = 0, **options: Any) -> Any:
    """A quantized base with LoRA on every linear layer."""
    base = kbit.prepare_for_training(tiny.load(path, kbit.KbitConfig(**{"bits": 4, **options})))
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora)


def codes_of(model: Any) -> dict[str, torch.Tensor]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    assert len(layers) >= 14
    return {f"{name}.{part}": t.detach().clone() for name, m in layers.items() for part, t in m.parts().items()}


def assert_frozen(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = codes_of(model)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def examples(count: int = 8) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 128, (count, 16), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_weights(one: Any, two: Any) -> None:
    expected = trained(two)
    assert len(expected) >= 28
    for name, value in trained(one).items():
        assert torch.equal(value, expected[name]), name


# ---- the same curve through three libraries ----


@functools.cache
def curve(path: Path, way: str, scales: str, shim: bool) -> dict[str, Any]:
    output = run_file(CURVE, path, way, scales, shim=shim)
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("scales", ["plain", "double"])
def test_loss_curves_of_native_kbit_and_the_drop_in_agree(path: Path, scales: str) -> None:
    native = curve(path, "native", scales, False)
    drop_in = curve(path, "bitsandbytes", scales, True)
    assert native["library"].startswith("kbit") and drop_in["library"].endswith("+kbit")
    assert len(native["losses"]) == len(drop_in["losses"]) == 50
    assert native["losses"][0] > math.log(128) - 0.3 and native["losses"][-1] < 2
    # One step's difference is fed into all that follow: the whole curve is held to it, step by step.
    assert native["losses"] == pytest.approx(drop_in["losses"], rel=0.01)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes itself is not installed")
@pytest.mark.parametrize("scales", ["plain", "double"])
def test_loss_curves_of_kbit_and_bitsandbytes_agree(path: Path, scales: str) -> None:
    real = curve(path, "bitsandbytes", scales, False)
    assert real["library"].startswith("bitsandbytes") and "kbit" not in real["library"]
    for way, shim in (("native", False), ("bitsandbytes", True)):
        assert curve(path, way, scales, shim)["losses"] == pytest.approx(real["losses"], rel=0.01), way


def test_the_curve_can_tell_formats_apart(path: Path) -> None:
    """Double quantization changes weights by a fraction of a per cent; the curves show it, so they are no constant."""
    assert curve(path, "native", "plain", False)["losses"] != curve(path, "native", "double", False)["losses"]


# ---- a plain loop ----


def loop(model: Any, optimizer: Any, start: int, end: int) -> list[float]:
    batch = torch.stack([example["input_ids"] for example in examples()])
    losses = []
    model.train()
    for step in range(start, end):
        ids = batch[4 * (step % 2) :][:4]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model: Any, name: str = "AdamW") -> Any:
    from kbit import optim

    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "AdamW":
        return torch.optim.AdamW(parameters, lr=1e-2)
    return getattr(optim, name)(parameters, lr=1e-2, min_8bit_size=256)  # the smallest adapter has 512 elements


@pytest.mark.parametrize(
    ("options", "optimizer_name"),
    [({}, "AdamW"), ({"double_quant": False, "format": "fp4"}, "PagedAdamW8bit"), ({"bits": 8}, "AdamW8bit")],
    ids=["nf4", "fp4-plain", "int8"],
)
def test_plain_loop_learns_and_resumes(
    path: Path, tmp_path: Path, options: dict[str, Any], optimizer_name: str
) -> None:
    model = qlora(path, **options)
    before = codes_of(model)
    optimizer = optimizer_of(model, optimizer_name)
    losses = loop(model, optimizer, 0, 10)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    losses += loop(model, optimizer, 10, 16)
    assert losses[-1] < losses[0] - 0.5
    assert_frozen(model, before)

    # The adapter is saved alone, and goes on from there on a fresh base as if it had not stopped.
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and not files & {"model.safetensors", "config.json"}
    base = kbit.prepare_for_training(tiny.load(path, kbit.KbitConfig(**{"bits": 4, **options})))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    optimizer = optimizer_of(again, optimizer_name)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert loop(again, optimizer, 10, 16) == losses[10:]
    assert_equal_weights(again, model)


# ---- transformers' Trainer ----


def arguments(output: Path, steps: int, **options: Any) -> Any:
    settings = dict(
        per_device_train_batch_size=4,
        max_steps=steps,
        save_steps=5,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return transformers.TrainingArguments(output_dir=str(output), **{**settings, **options})


def losses_of(trainer: Any) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("optimizer_name", [None, "AdamW8bit"])
def test_trainer_learns_and_resumes(path: Path, tmp_path: Path, bits: int, optimizer_name: str | None) -> None:
    def trainer(steps: int, seed: int) -> Any:
        model = qlora(path, seed=seed, bits=bits)
        optimizers = (optimizer_of(model, optimizer_name), None) if optimizer_name else (None, None)
        return transformers.Trainer(
            model=model, args=arguments(tmp_path / "out", steps), train_dataset=examples(), optimizers=optimizers
        )

    whole = trainer(10, seed=0)
    before = codes_of(whole.model)
    whole.train()
    losses = losses_of(whole)
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.3
    assert_frozen(whole.model, before)
    checkpoint = tmp_path / "out" / "checkpoint-5"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()

    # Another start, so that everything the second half is made of has to come from the checkpoint.
    second = trainer(10, seed=1)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 10
    assert losses_of(second)[-5:] == losses[-5:]
    assert_equal_weights(second.model, whole.model)


def test_trainer_refuses_a_quantized_model_without_adapters(path: Path, tmp_path: Path) -> None:
    """Training codes is impossible; transformers says so as soon as the Trainer is made."""
    model = tiny.load(path, kbit.KbitConfig(bits=4))
    with pytest.raises(ValueError, match="purely quantized|adapters"):
        transformers.Trainer(model=model, args=arguments(tmp_path, 1), train_dataset=examples())


# ---- TRL's SFTTrainer ----


def sft_config(output: Path, steps: int, **options: Any) -> Any:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    values = arguments(output, steps).to_dict()
    names = ("per_device_train_batch_size", "save_steps", "logging_steps", "learning_rate", "lr_scheduler_type")
    names += ("report_to", "disable_tqdm", "use_cpu", "dataloader_pin_memory", "max_steps")
    common = {name: values[name] for name in names}
    return trl.SFTConfig(output_dir=str(output), **common, max_length=24, bf16=False, packing=False, **options)


def conversation() -> Any:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    lines = [
        "tell me a short story about the brave knight",
        "what is the capital of the world ?",
        "hello , how are you ?",
    ]
    return datasets.Dataset.from_list([{"text": line} for line in lines * 4])


LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("bits", [4, 8])
def test_sft_trainer_learns_and_resumes(path: Path, tmp_path: Path, bits: int) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def trainer(output: Path) -> Any:
        return trl.SFTTrainer(
            model=kbit.prepare_for_training(tiny.load(path, kbit.KbitConfig(bits=bits))),
            args=sft_config(output, 10),
            train_dataset=conversation(),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(**LORA),
        )

    whole = trainer(tmp_path / "out")
    before = codes_of(whole.model)
    whole.train()
    losses = losses_of(whole)
    assert losses[-1] < losses[0] - 0.3
    assert_frozen(whole.model, before)
    second = trainer(tmp_path / "out")
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert losses_of(second)[-5:] == pytest.approx(losses[-5:], abs=1e-6)

    whole.save_model(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(tiny.load(path, kbit.KbitConfig(bits=bits)), tmp_path / "adapter").eval()
    assert torch.equal(tiny_logits(fresh), tiny_logits(whole.model.eval()))


def tiny_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


def test_sft_trainer_loads_the_model_itself(path: Path, tmp_path: Path) -> None:
    """The model by name, the config in `model_init_kwargs`: nothing of kbit's but the config."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    init = {"quantization_config": kbit.KbitConfig(bits=4), "dtype": "float32", "device_map": None}
    trainer = trl.SFTTrainer(
        model=str(path),
        args=sft_config(tmp_path / "out", 6, model_init_kwargs=init),
        train_dataset=conversation(),
        peft_config=peft.LoraConfig(**LORA),
    )
    before = codes_of(trainer.model)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] - 0.2
    assert_frozen(trainer.model, before)
