"""A Llama-3-8B-shaped model (random weights, the real sizes) end to end: decode, prefill, memory, quantizing, QLoRA.

    python -m benchmarks.end_to_end --parts decode,prefill --formats bf16,nf4 --batches 1,8

Formats: bf16, nf4, fp4, int8 (threshold 6, with activations like those of real models; int8-drawn: with those that
the random weights give; int8-all: embedding and head too), bnb-nf4 and bnb-int8 (bitsandbytes). Decoding is timed
under transformers' `generate`, and compiled: the decoder layer with `torch.compile(fullgraph=True)` over a static
cache, one whole step, token choice included, in one CUDA graph; kbit's formats with kbit's backend for it
(`--backend`). `--whole` compiles transformers' own forward instead (mode reduce-overhead), which takes a minute a
model. Before a format is timed, every linear layer of one decoder layer is compared with the float64 product of its
weight, and the compiled step with transformers' own forward. Results are merged into
benchmarks/results/end_to_end-<gpu>.json, part by part.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import kbit
from benchmarks import verify
from benchmarks.compiled_decode import LOGITS, Decoder, compiled_decode, whole_decode
from benchmarks.run import RESULTS, environment, gpu_name

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
PARTS = ("decode", "eager", "prefill", "quantize", "qlora")
# bf16 in and out of one product.
TOLERANCE = 8e-3
# torch's attention kernels; "any" leaves the choice to torch. "packed" too, but query heads that share a key head are
# its queries: transformers does so without compilation, and repeats the whole cache for every query head with it.
ATTENTION = ("any", "packed", "cudnn_attention", "efficient_attention", "math")


class Bench:
    """What the parts share: device, sizes, and one model that is built anew for every format."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cpu" if args.tiny and not torch.cuda.is_available() else "cuda")
        self.sizes = {**(TINY if args.tiny else SIZES)}
        if args.layers:
            self.sizes["num_hidden_layers"] = args.layers
        self.prefill_tokens, self.train_shape = (64, (2, 32)) if args.tiny else (2048, (4, 1024))
        self.label_is_kbits = False
        self.attention_kernel = "any"
        self.prompt, self.max_length, self.steps = (8, 32, 8) if args.tiny else (64, 256, 96)

    def attention(self) -> AbstractContextManager[object]:
        name = self.attention_kernel.upper()
        if name in ("ANY", "PACKED"):
            return contextlib.nullcontext()
        return sdpa_kernel(getattr(SDPBackend, name))

    def compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """torch.compile without a break; for kbit's formats with kbit's backend, unless --backend says otherwise."""
        name = "inductor" if self.args.backend == "auto" and not self.label_is_kbits else self.args.backend
        backend = "inductor" if name == "inductor" else kbit.compile_backend
        if self.args.pdl:
            from torch._inductor import config

            config.triton.enable_pdl = True
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, **options)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repetitions: int = 5) -> float:
        """Median seconds of a call after two to warm up."""
        run(), run()
        times = []
        for _ in range(repetitions):
            self.sync()
            begin = time.perf_counter()
            run()
            self.sync()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {
            "allocated_gb": round(torch.cuda.memory_allocated() / 1e9, 2),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }

    def build(self) -> nn.Module:
        """The bf16 model, drawn on the device."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            **self.sizes, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                model: nn.Module = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        return model.eval().requires_grad_(False)

    def model(self, label: str) -> tuple[nn.Module, float]:
        """(the model in a format, seconds that quantizing took)."""
        self.label_is_kbits = label != "bf16" and not label.startswith("bnb-")
        model = self.build()
        self.sync()
        if label == "bf16":
            return model, 0.0
        weights = _layer_weights(model)
        if label in ("int8", "int8-all"):
            _add_outliers(model)
            weights = _layer_weights(model)
        begin = time.perf_counter()
        if label.startswith("bnb-"):
            _bitsandbytes(model, label)
        else:
            every = {"skip_modules": [], "quantize_embeddings": True} if label == "int8-all" else {}
            config = kbit.KbitConfig.from_format(label.split("-")[0], **every)
            kbit.quantize_model(model, config)
        self.sync()
        seconds = time.perf_counter() - begin
        self.check_layers(label, model, weights)
        return model, seconds

    @torch.no_grad()
    def check_layers(self, label: str, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Every linear layer of the first decoder layer against float64, at 1, 8 and 300 tokens."""
        if label.startswith("bnb-"):
            return
        for name, weight in weights.items():
            layer = model.get_submodule(name)
            exact = layer.dequantize(torch.float32).double()
            verify.require_close(f"{name} quantized", exact, weight.double(), 0.13)
            for m in (1, 8, 300):
                x = torch.randn(m, exact.shape[1], device=self.device).bfloat16()
                many = label.startswith("int8") and m > 16  # LLM.int8() rounds the activations too
                tolerance = 2e-2 if many else TOLERANCE
                verify.require_close(f"{label} {name}, {m} tokens", layer(x), x.double() @ exact.T, tolerance)


def _layer_weights(model: nn.Module) -> dict[str, Tensor]:
    first = model.model.layers[0]
    return {
        f"model.layers.0.{name}": module.weight.detach().clone()
        for name, module in first.named_modules()
        if isinstance(module, nn.Linear)
    }


def _add_outliers(model: nn.Module) -> None:
    """Activations as real models have them: six features of every normalized one beyond the threshold of LLM.int8(),
    and none between the projections of a feed-forward layer, where random weights put one into nearly every feature
    of a long prompt."""
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[:: norm.weight.shape[0] // 6][:6] = 20.0
        layer.mlp.up_proj.weight.data *= 0.125


def _bitsandbytes(model: nn.Module, label: str) -> None:
    import bitsandbytes as bnb

    for name, module in list(model.model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        shape = (module.in_features, module.out_features)
        if label == "bnb-nf4":
            layer = bnb.nn.Linear4bit(
                *shape,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            layer.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
            ).to(module.weight.device)
        else:
            layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
            layer.weight = bnb.nn.Int8Params(module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            layer = layer.to(module.weight.device)
        parent, _, child = name.rpartition(".")
        setattr(model.model.get_submodule(parent), child, layer)


@torch.no_grad()
def eager_decode(bench: Bench, label: str, model: nn.Module, batch: int) -> dict[str, Any]:
    """transformers' `generate`, greedy: seconds of 24 new tokens less those of 4."""
    prompt = torch.randint(0, model.config.vocab_size, (batch, bench.prompt), device=bench.device)
    few, many = 4, 24

    def seconds_of(count: int) -> float:
        bench.sync()
        begin = time.perf_counter()
        model.generate(prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0)
        bench.sync()
        return time.perf_counter() - begin

    seconds_of(few)
    seconds = (min(seconds_of(many) for _ in range(2)) - min(seconds_of(few) for _ in range(2))) / (many - few)
    return {"tokens_a_second": round(batch / seconds, 1), "ms_a_step": round(seconds * 1e3, 2)}


@torch.no_grad()
def prefill(bench: Bench, label: str, model: nn.Module) -> dict[str, Any]:
    """transformers' own forward, as it is called and captured in a CUDA graph: launching one operation at a time keeps
    the host busy for about as long as the GPU."""
    ids = torch.randint(0, model.config.vocab_size, (1, bench.prefill_tokens), device=bench.device)

    def run() -> Tensor:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
        return logits

    seconds = bench.seconds(run, 15)
    figures: dict[str, Any] = {"tokens_a_second": round(ids.numel() / seconds), "ms": round(seconds * 1e3, 2)}
    if bench.device.type == "cuda" and not label.startswith("bnb-"):  # bitsandbytes' int8 waits for the device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        seconds = bench.seconds(graph.replay, 15)
        verify.require_close(f"{label}, captured prefill", captured, run(), LOGITS[label])
        figures["captured"] = {"tokens_a_second": round(ids.numel() / seconds), "ms": round(seconds * 1e3, 2)}
    return figures


def qlora(bench: Bench, label: str, model: nn.Module) -> dict[str, Any]:
    """Forward and backward of LoRA on all linear layers, with gradient checkpointing."""
    import peft

    torch.manual_seed(0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = peft.get_peft_model(model, config, autocast_adapter_dtype=False).train()
    ids = torch.randint(0, model.config.vocab_size, bench.train_shape, device=bench.device)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses = []

    def step() -> None:
        loss = trained(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())

    seconds = bench.seconds(step, 3)
    gradients = [p.grad for p in trained.parameters() if p.requires_grad]
    if not gradients or not all(g is not None and bool(g.isfinite().all()) for g in gradients):
        raise verify.WrongResult(f"{label}: a LoRA gradient is missing or not finite")
    if not bool(torch.stack(losses).isfinite().all()):
        raise verify.WrongResult(f"{label}: the loss is not finite")
    return {"forward_backward_s": round(seconds, 4), **bench.memory()}


def decode_name(part: str, kernel: str, args: argparse.Namespace) -> str:
    """Under which name figures are kept: "decode", "decode_whole", "decode_packed", "decode_packed_pdl", "eager"."""
    if part != "decode" or args.whole:
        return "decode_whole" if part == "decode" else part
    return part + ("" if kernel == "any" else f"_{kernel}") + ("_pdl" if args.pdl else "")


def measure(bench: Bench, label: str) -> dict[str, Any]:
    """Every part for one format: {part: figures}."""
    args = bench.args
    row: dict[str, Any] = {}
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, seconds = bench.model(label)
    row["model"] = bench.memory()
    if "quantize" in args.parts and label != "bf16":
        row["quantize"] = {"first_s": round(seconds, 2)}
        if not label.startswith("bnb-"):  # the first one compiles and warms up
            del model
            gc.collect()
            model, seconds = bench.model(label)
            row["quantize"]["s"] = round(seconds, 2)
    if "prefill" in args.parts:
        row["prefill"] = prefill(bench, label, model)
        print(label, "prefill", row["prefill"], flush=True)
    for part, function in (("decode", whole_decode if args.whole else compiled_decode), ("eager", eager_decode)):
        if part in args.parts:
            for kernel in args.attention if function is compiled_decode else ["any"]:
                bench.attention_kernel = kernel
                name = decode_name(part, kernel, args)
                row[name] = {}
                for batch in args.batches:
                    row[name][str(batch)] = function(bench, label, model, batch)
                    print(label, name, "batch", batch, row[name][str(batch)], flush=True)
    if args.profile:
        profile(bench, model, args.batches[0])
    if "qlora" in args.parts and "int8" not in label:
        row["qlora"] = qlora(bench, label, model)
        print(label, "qlora", row["qlora"], flush=True)
    return row


@torch.no_grad()
def profile(bench: Bench, model: nn.Module, batch: int) -> None:
    """What the kernels of one compiled step cost, most expensive first."""
    step = Decoder(bench, model, batch)
    step(), step()
    with torch.profiler.profile() as trace:
        step()
        bench.sync()
    sort = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=sort, row_limit=18, max_name_column_width=60), flush=True)


def ratios(result: dict[str, Any]) -> None:
    """Speed over bf16 beside every figure that bf16 has too."""
    base = result["formats"].get("bf16")
    for label, row in result["formats"].items():
        if base is None or label == "bf16":
            continue
        for part in (name for name in row if name.startswith("decode") or name == "eager"):
            for batch, figures in row.get(part, {}).items():
                if batch in base.get(part, {}):
                    ratio = figures["tokens_a_second"] / base[part][batch]["tokens_a_second"]
                    figures["speed_over_bf16"] = round(ratio, 3)
        if "prefill" in row and "prefill" in base:
            pairs = [(row["prefill"], base["prefill"])]
            if "captured" in row["prefill"] and "captured" in base["prefill"]:
                pairs.append((row["prefill"]["captured"], base["prefill"]["captured"]))
            for own, theirs in pairs:
                own["speed_over_bf16"] = round(own["tokens_a_second"] / theirs["tokens_a_second"], 3)
        if "qlora" in row and "qlora" in base:
            ratio = row["qlora"]["forward_backward_s"] / base["qlora"]["forward_backward_s"]
            row["qlora"]["time_over_bf16"] = round(ratio, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--parts", type=names, default=list(PARTS))
    parser.add_argument("--formats", type=names, default=["bf16", "nf4", "int8"])
    parser.add_argument("--batches", type=lambda text: [int(b) for b in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--whole", action="store_true", help="compile transformers' own forward")
    parser.add_argument(
        "--attention", type=names, default=["any"], help=f"of compiled decoding, among {', '.join(ATTENTION)}"
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "inductor", "kbit"],
        default="auto",
        help="of torch.compile; auto: kbit's for its own formats, which multiplies layers that share an input at once",
    )
    parser.add_argument("--pdl", action="store_true", help="Inductor's kernels start while the one before still runs")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the benchmark itself; also on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if unknown := set(args.attention) - set(ATTENTION):
        parser.error(f"unknown attention: {', '.join(sorted(unknown))}; there are {', '.join(ATTENTION)}")
    if unknown := set(args.formats) - set(LOGITS):
        parser.error(f"unknown formats: {', '.join(sorted(unknown))}; there are {', '.join(LOGITS)}")
    if not args.tiny and not torch.cuda.is_available():
        parser.exit(2, "these figures need a CUDA GPU, and torch sees none\n")
    bench = Bench(args)
    path = args.out / f"end_to_end-{gpu_name() if bench.device.type == 'cuda' else 'cpu'}.json"
    keep = path.is_file() and not args.tiny
    result = json.loads(path.read_text()) if keep else {"formats": {}}
    result = {**result, **environment(), "model": bench.sizes}
    for label in args.formats:
        for part, figures in measure(bench, label).items():
            result["formats"].setdefault(label, {})[part] = figures
        ratios(result)
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
