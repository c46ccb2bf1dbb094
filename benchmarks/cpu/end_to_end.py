"""A language model on a CPU: tokens a second of decoding and of a prefill, seconds to quantize, all formats in one run.

    python -m benchmarks.cpu.end_to_end --threads 2 --out benchmarks/results/cpu-end-to-end.json
    python -m benchmarks.cpu.end_to_end --model demo --threads 2 --out benchmarks/results/cpu-end-to-end-demo.json

The default model is Llama-shaped with random weights, 1.04 G parameters in layers and head; `demo` is the model that
ships with kbit. The formats take turns, so that noise of the machine meets them alike; figures are medians.
Output heads stay in bf16 for torch, kbit and bitsandbytes, but for "kbit nf4+head". Keys and values lie in a static
cache of transformers. A format with " compiled" behind its name decodes by transformers' own forward under
torch.compile (kbit's backend for kbit's formats, Inductor for the others); its prompt is read without. With
--llama-python PYTHON (an environment with llama-cpp-python and gguf) llama.cpp's Q4_0 takes part on the same shapes;
its output head is Q6_K, see llama_gguf.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, StaticCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kbit
from benchmarks.cpu.paired import cpu_name
from kbit.assets import demo_model

COMPILED = " compiled"
FORMATS = "bf16,kbit nf4,kbit nf4+head,kbit int8,bitsandbytes nf4,bitsandbytes int8"
FORMATS += f",bf16{COMPILED},kbit nf4{COMPILED},kbit nf4+head{COMPILED}"
CORES = range(os.cpu_count() or 1)
LLAMA = Path(__file__).with_name("llama_gguf.py")


def random_model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else parameter.data.normal_(0, 0.02)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)  # its buffers are computed, not loaded
    return model.eval()


def bitsandbytes_model(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """Every linear layer but the head, converted as transformers does it."""
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or "head" in name:
            continue
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        if bits == 4:
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            new.weight = bnb.nn.Int8Params(linear.weight.data, has_fp16_weights=False, requires_grad=False)
        new.bias = linear.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.to("cpu"))
    return model.eval()


def kbit_model(model: torch.nn.Module, bits: int, **options: Any) -> torch.nn.Module:
    return kbit.quantize_model(model, kbit.KbitConfig(bits=bits, **options))


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """One token's attention, query `[batch, heads, 1, dim]`: the heads that share a key head are multiplied at once, as
    transformers does it where it does not compile. Head by head, torch's bf16 product takes eight times as long."""
    batch, heads, _one, dim = query.shape
    packed = query.reshape(batch, key.shape[1], -1, dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attention_mask, scale=options.get("scaling")
    )
    return out.reshape(batch, 1, heads, dim), None


class Decoder:
    """Greedy decoding of one model over a static cache; compiled or as transformers calls it."""

    def __init__(self, model: Any, length: int, backend: str | Callable[..., Any] | None) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.compiled = backend is not None
        self.checks = True
        self.step = model.forward
        if backend is not None:
            self.step = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def check(self, prompt: Tensor) -> None:
        """Raise ValueError unless a compiled step's logits are those of the model as it is, within bf16's rounding."""
        logits = []
        for attention, forward in (("sdpa", self.model.forward), ("packed", self.step)):
            self.cache.reset()
            token = self.model(prompt, past_key_values=self.cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            self.model.set_attn_implementation(attention)
            logits.append(forward(token, past_key_values=self.cache).logits.float())
            self.model.set_attn_implementation("sdpa")
        error = float((logits[0] - logits[1]).norm() / logits[0].norm())
        if not error < 0.05:
            raise ValueError(f"the compiled step's logits differ from the model's by {error:.3f} of their norm")

    @torch.inference_mode()
    def measure(self, prompt: Tensor, steps: int) -> tuple[float, float]:
        """Tokens a second of `steps` greedy steps after the prompt, and of the prompt."""
        self.cache.reset()
        begin = time.perf_counter()
        out = self.model(prompt, past_key_values=self.cache, logits_to_keep=1)
        prefilled = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.compiled:
                self.model.set_attn_implementation("packed")
                stack.callback(self.model.set_attn_implementation, "sdpa")
                if not self.checks:  # what was compiled is known to fit after the first call
                    stack.enter_context(torch.compiler.set_stance("default", skip_guard_eval_unsafe=True))
            for _ in range(steps):
                out = self.step(out.logits[:, -1:].argmax(-1), past_key_values=self.cache)
            decoded = time.perf_counter()
        self.checks = False
        return steps / (decoded - prefilled), prompt.shape[1] / (prefilled - begin)


def llama(args: argparse.Namespace) -> dict[str, Any]:
    command = [args.llama_python, str(LLAMA), str(args.llama_model), "--format", "Q4_0"]
    command += ["--threads", str(args.threads), "--prefill", str(args.prefill), "--decode", str(args.decode)]
    # With OMP_PROC_BIND this thread is bound to one core, which a process that it starts would share among its threads.
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        done = subprocess.run([*command, "--turns", "1"], capture_output=True, text=True, check=True)
    finally:
        os.sched_setaffinity(0, bound)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["llama-1b", "demo"], default="llama-1b")
    parser.add_argument("--formats", default=FORMATS)
    for name, default in (("threads", 2), ("prefill", 256), ("decode", 24), ("turns", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--llama-python")
    parser.add_argument("--llama-model", type=Path, default=Path("model.gguf"), help="F16 file, written if missing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.model == "demo":
        base = transformers.AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16).eval()
    else:
        base = random_model()
    prompt = torch.randint(0, base.config.vocab_size, (1, args.prefill))

    makers: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
        "bf16": lambda model: model,
        "kbit nf4": lambda model: kbit_model(model, 4),
        "kbit nf4+head": lambda model: kbit_model(model, 4, skip_modules=[]),
        "kbit int8": lambda model: kbit_model(model, 8),
        "bitsandbytes nf4": lambda model: bitsandbytes_model(model, 4),
        "bitsandbytes int8": lambda model: bitsandbytes_model(model, 8),
    }
    kbit.quantize(torch.randn(64, 64), "nf4"), kbit.quantize(torch.randn(64, 64), "int8")  # loads the library
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)
    torch._dynamo.config.cache_size_limit = 64
    models: dict[str, torch.nn.Module] = {}
    decoders: dict[str, Decoder] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in args.formats.split(","):
        kind = name.removesuffix(COMPILED)
        if kind not in models:
            model = base if kind == "bf16" else copy.deepcopy(base)
            begin = time.perf_counter()
            models[kind] = makers[kind](model)
            rows[name] = {"quantize_s": round(time.perf_counter() - begin, 2)} if kind != "bf16" else {}
            gc.collect()
        backend = None if kind == name else kbit.compile_backend if "kbit" in name else "inductor"
        decoders[name] = Decoder(models[kind], args.prefill + args.decode, backend)
    decode: dict[str, list[float]] = {name: [] for name in decoders}
    prefill: dict[str, list[float]] = {name: [] for name in decoders}
    for name, decoder in decoders.items():
        begin = time.perf_counter()
        if decoder.compiled:
            decoder.check(prompt[:, :64])
        decoder.measure(prompt[:, :64], 3)
        if decoder.compiled:
            rows[name] = {"compile_s": round(time.perf_counter() - begin, 1)}
    for _ in range(args.turns):
        for name, decoder in decoders.items():
            a, b = decoder.measure(prompt, args.decode)
            print(f"{name}: {a:.2f} and {b:.1f} tokens a second", file=sys.stderr)
            decode[name].append(a)
            prefill[name].append(b)
        if args.llama_python:
            found = llama(args)
            rows.setdefault("llama.cpp Q4_0", {"version": found["version"]})
            decode.setdefault("llama.cpp Q4_0", []).append(found["decode"])
            prefill.setdefault("llama.cpp Q4_0", []).append(found["prefill"])
    for name, row in rows.items():
        for key, values in (("decode", decode[name]), ("prefill", prefill[name])):
            row[f"{key}_tokens_per_s"] = round(statistics.median(values), 2)
            row[f"{key}_range"] = [round(min(values), 2), round(max(values), 2)]
            if "bf16" in decode:
                base_rate = statistics.median((decode if key == "decode" else prefill)["bf16"])
                row[f"{key}_over_bf16"] = round(statistics.median(values) / base_rate, 2)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "bitsandbytes")}
    result = {
        "benchmark": f"{args.model}: decoding after a prefill of {args.prefill} tokens, batch 1, on a CPU",
        "machine": f"{platform.machine()}, {args.threads} threads: {cpu_name()}",
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "rows": rows,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
