"""The Hugging Face libraries over a model folder, with kbit as bitsandbytes. One flow a name; asserts inside.

Usage: stack.py MODEL SCRATCH
"""

import copy
import importlib.metadata
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

torch.set_num_threads(1)
MODEL, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
IDS = torch.arange(1, 25).view(1, -1)
CONFIGS = {
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "8bit": {"load_in_8bit": True},
}


def tiny_models():
    from tests.integrations.dropin.harness import llama

    small = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **small)
    opt = transformers.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64, **small
    )
    t5 = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0, **small
    )
    torch.manual_seed(0)
    return {
        "llama": llama(),
        "gpt2": transformers.GPT2LMHeadModel(gpt2).to(torch.bfloat16),
        "opt": transformers.OPTForCausalLM(opt).to(torch.bfloat16),
        "t5": transformers.T5ForConditionalGeneration(t5).to(torch.bfloat16),
    }


def logits(model, **kwargs):
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(IDS.to(model.device), **extra, **kwargs).logits.float()


def load(path=MODEL, kind="4bit", **kwargs):
    config = {"quantization_config": BitsAndBytesConfig(**CONFIGS[kind])} if kind else {}
    return AutoModelForCausalLM.from_pretrained(
        path, **config, device_map={"": "cpu"}, torch_dtype=torch.bfloat16, **kwargs
    )


def layers(model):
    import bitsandbytes as bnb

    return [m for m in model.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]


def detection():
    import accelerate.utils.imports as accelerate_imports
    import bitsandbytes as bnb
    import peft.import_utils as peft_imports
    from transformers.utils import is_bitsandbytes_available

    assert is_bitsandbytes_available() and peft_imports.is_bnb_available() and peft_imports.is_bnb_4bit_available()
    assert accelerate_imports.is_4bit_bnb_available() and accelerate_imports.is_8bit_bnb_available()
    assert accelerate_imports.is_bnb_available("0.46.1")
    assert accelerate_imports.is_bitsandbytes_multi_backend_available()
    assert importlib.metadata.version("bitsandbytes") == bnb.__version__ == "0.50.2+kbit"
    assert not bnb.__version__ < "0.46.1"  # vLLM compares strings
    assert torch.nn.Linear not in {bnb.nn.Linear4bit, bnb.nn.Linear8bitLt} and "cpu" in bnb.supported_torch_devices


def architectures():
    for name, model in tiny_models().items():
        model.eval().save_pretrained(folder := SCRATCH / name)
        cls = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        expected = logits(model)
        for kind, config in CONFIGS.items():
            for device_map in ("auto", "cpu"):
                quantized = cls.from_pretrained(
                    folder,
                    quantization_config=BitsAndBytesConfig(**config),
                    device_map=device_map,
                    torch_dtype=torch.bfloat16,
                )
                assert len(layers(quantized)) >= 8, name
                found = logits(quantized)
                error = (found - expected).norm() / expected.norm()
                assert error < (0.25 if kind == "4bit" else 0.03), (name, kind, float(error))
            assert quantized.generate(IDS[:, :4], max_new_tokens=4, do_sample=False).shape[1] >= 4
            saved = SCRATCH / f"{name}-{kind}"
            quantized.save_pretrained(saved)
            again = cls.from_pretrained(saved, device_map="cpu", torch_dtype=torch.bfloat16)
            assert len(layers(again)) == len(layers(quantized))
            assert torch.equal(logits(again), found), (name, kind, "reloaded")
            assert again.get_memory_footprint() == quantized.get_memory_footprint()


def keyword_of_transformers_4():
    if int(transformers.__version__.split(".")[0]) >= 5:
        return
    for keyword in ("load_in_8bit", "load_in_4bit"):
        model = AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto", **{keyword: True})
        assert len(layers(model)) == 14 and torch.isfinite(logits(model)).all()


def dequantize():
    for kind in CONFIGS:
        model = load(kind=kind)
        expected = logits(model)
        plain = model.dequantize()
        assert not layers(plain) and (logits(plain) - expected).norm() / expected.norm() < 0.02


def damaged_checkpoints():
    """Whatever transformers makes of the error, loading stops and nothing is garbage."""
    from safetensors.torch import load_file, save_file

    load().save_pretrained(good := SCRATCH / "good")
    tensors = load_file(good / "model.safetensors")
    blob = next(key for key in tensors if key.endswith("bitsandbytes__nf4"))
    weight = blob.split(".quant_state")[0]
    damages = {
        "truncated": {**tensors, blob: tensors[blob][:-9].clone()},
        "codes": {**tensors, weight: tensors[weight][:-1].clone()},
        "scales": {**tensors, f"{weight}.absmax": tensors[f"{weight}.absmax"][:-1].clone()},
    }
    for name, changed in damages.items():
        folder = SCRATCH / f"damaged-{name}"
        shutil.copytree(good, folder)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        try:
            load(folder, kind=None)
        except (ValueError, RuntimeError):
            continue
        raise AssertionError(f"{name}: a damaged checkpoint was loaded")


def peft():
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    from kbit.integrations.bitsandbytes.blockwise import quantize_4bit

    for kind in CONFIGS:
        model = prepare_model_for_kbit_training(load(kind=kind))
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        losses = []
        for _ in range(8):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.05, (kind, losses)

        model.eval()
        trained = logits(model)
        model.save_pretrained(adapter := SCRATCH / f"adapter-{kind}")
        fresh = PeftModel.from_pretrained(prepare_model_for_kbit_training(load(kind=kind)), adapter).eval()
        assert torch.equal(logits(fresh), trained)

        # Merging after evaluation requantizes dequantize(W) + BA, to the bit.
        lora = next(m for m in fresh.modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight"))
        base = lora.get_base_layer()
        if kind == "4bit":
            import bitsandbytes as bnb

            w = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
            wanted, _ = quantize_4bit(w + lora.get_delta_weight("default"), quant_type="nf4", compress_statistics=True)
        fresh.merge_adapter()
        if kind == "4bit":
            assert torch.equal(base.weight.data, wanted)
        tolerance = 0.15 if kind == "4bit" else 0.03
        assert (logits(fresh) - trained).norm() / trained.norm() < tolerance
        fresh.unmerge_adapter()
        assert (logits(fresh) - trained).norm() / trained.norm() < tolerance
        merged = fresh.merge_and_unload()
        assert len(layers(merged)) == 14 and (logits(merged) - trained).norm() / trained.norm() < 1.5 * tolerance


def trainer():
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(16)]
    for kind, optim in (("4bit", "paged_adamw_8bit"), ("8bit", "adamw_bnb_8bit"), ("4bit", "lion_8bit")):
        lora = LoraConfig(r=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")  # 64 x 64: 8-bit states
        model = get_peft_model(prepare_model_for_kbit_training(load(kind=kind)), lora)

        def arguments(steps, optim=optim):
            return TrainingArguments(
                output_dir=str(SCRATCH / f"trainer-{kind}-{optim}"),  # noqa: B023
                per_device_train_batch_size=4,
                max_steps=steps,
                save_steps=4,
                logging_steps=1,
                learning_rate=1e-3 if optim == "lion_8bit" else 1e-2,
                optim=optim,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            )

        run = Trainer(model=model, args=arguments(6), train_dataset=data)
        run.train()
        losses = [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0], (kind, optim, losses)
        inner = run.optimizer.optimizer
        assert "bitsandbytes" in str(type(inner))
        assert any(t.dtype == torch.uint8 for state in inner.state.values() for t in state.values())
        resumed = Trainer(model=model, args=arguments(8), train_dataset=data)
        resumed.train(resume_from_checkpoint=str(SCRATCH / f"trainer-{kind}-{optim}" / "checkpoint-4"))
        assert resumed.state.global_step == 8


def trainer_resumes_exactly():
    """Trainer overrides embeddings to 32 bits after constructing: a resumed run continues to the bit all the same."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": IDS[0] + i % 8, "labels": IDS[0] + i % 8} for i in range(16)]

    def run(steps, resume=None):
        arguments = TrainingArguments(
            output_dir=str(SCRATCH / "resume"),
            per_device_train_batch_size=4,
            max_steps=steps,
            save_steps=3,
            lr_scheduler_type="constant",
            learning_rate=1e-3,
            optim="adamw_bnb_8bit",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        model = AutoModelForCausalLM.from_pretrained(MODEL, torch_dtype=torch.float32)
        made = Trainer(model=model, args=arguments, train_dataset=data)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run(6)
    resumed = run(6, str(SCRATCH / "resume" / "checkpoint-3"))
    table = whole.model.get_input_embeddings().weight
    states = [trainer.optimizer.optimizer.state for trainer in (whole, resumed)]
    assert states[0][table]["exp_avg"].dtype == torch.float32
    assert any(v.dtype == torch.uint8 for s in states[0].values() for v in s.values())
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def optimizer_names():
    """Every name of Trainer's that stands for an optimizer of bitsandbytes gives ours, of its bits, and it steps."""
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    import kbit.optim

    marks = ("8bit", "32bit", "bnb", "ademamix")
    names = [name.value for name in OptimizerNames if any(mark in name.value for mark in marks)]
    names = [name for name in names if not name.startswith(("galore", "apollo", "adamw_torch"))]
    assert len(names) >= 15, names
    for name in names:
        arguments = TrainingArguments(output_dir=str(SCRATCH / "names"), optim=name, report_to=[], use_cpu=True)
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
        p = torch.nn.Parameter(torch.ones(5000))
        optimizer = kind([p], **keywords)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert kind.__module__.startswith("bitsandbytes.") and isinstance(optimizer, kbit.optim.KbitOptimizer), name
        wanted = torch.uint8 if "8bit" in name else torch.float32
        state = next(value for key, value in optimizer.state[p].items() if key not in ("step",))
        assert state.dtype == wanted and (p < 1).all(), name


def accelerate():
    from accelerate import init_empty_weights
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

    config = transformers.AutoConfig.from_pretrained(MODEL)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config)
    for settings in (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bf16", "torch_dtype": "bf16"},
        {"load_in_8bit": True, "torch_dtype": "bf16"},
    ):
        device = {"": 0 if torch.cuda.is_available() else "cpu"}

        def quantize(settings=settings, device=device):
            config = BnbQuantizationConfig(**settings)
            return load_and_quantize_model(copy.deepcopy(empty), config, weights_location=str(MODEL), device_map=device)

        if "load_in_4bit" in settings and device[""] == "cpu":
            # accelerate itself refuses 4 bits on a CPU, whatever can compute there.
            try:
                quantize()
            except ValueError as error:
                assert "dispatched on the CPU" in str(error)
                continue
            raise AssertionError("accelerate quantized to 4 bits on a CPU: test it")
        model = quantize()
        assert len(layers(model)) == 14
        expected = logits(load(kind=None))
        assert (logits(model) - expected).norm() / expected.norm() < (0.25 if "load_in_4bit" in settings else 0.03)


def late_install():
    """Libraries that asked before kbit was there are told, in a process of its own."""
    import subprocess

    code = (
        "import transformers, peft, accelerate, sys\n"
        "from transformers.utils import is_bitsandbytes_available\n"
        "from transformers import AutoModelForCausalLM, BitsAndBytesConfig\n"
        "import peft.import_utils as p, transformers.integrations.bitsandbytes\n"
        "from kbit.integrations.bitsandbytes import install_as_bitsandbytes\n"
        "if not is_bitsandbytes_available():\n"
        "    assert not p.is_bnb_available() and not p.is_bnb_4bit_available()\n"
        "    install_as_bitsandbytes(); install_as_bitsandbytes()\n"
        "    assert is_bitsandbytes_available() and p.is_bnb_available() and p.is_bnb_4bit_available()\n"
        "    m = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map='cpu',\n"
        "        quantization_config=BitsAndBytesConfig(load_in_4bit=True))\n"
        "    m = peft.get_peft_model(m, peft.LoraConfig(target_modules=['q_proj'], task_type='CAUSAL_LM'))\n"
        "    assert 'Linear4bit' in str(m) and 'lora.Linear4bit' in str(m)\n"
        "    print('told')\n"
        "else:\n"
        "    try:\n"
        "        install_as_bitsandbytes()\n"
        "    except RuntimeError as error:\n"
        "        assert 'imported already' in str(error), error\n"
        "        print('refused')\n"
    )
    import os

    shim = str(Path(__file__).parents[3] / "kbit/integrations/bitsandbytes/shim")
    env = {**os.environ, "PYTHONPATH": os.environ["PYTHONPATH"].replace(shim + os.pathsep, "")}
    done = subprocess.run([sys.executable, "-c", code, str(MODEL)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("told", "refused")


FLOWS = [
    detection,
    architectures,
    keyword_of_transformers_4,
    dequantize,
    damaged_checkpoints,
    peft,
    trainer,
    trainer_resumes_exactly,
    optimizer_names,
    accelerate,
    late_install,
]

if __name__ == "__main__":
    import traceback

    failed = []
    for flow in FLOWS:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
            SCRATCH = Path(scratch)
            try:
                flow()
                print(f"PASSED {flow.__name__}")
            except Exception:
                print(f"FAILED {flow.__name__}\n{traceback.format_exc()}")
        SCRATCH = Path(sys.argv[2])
