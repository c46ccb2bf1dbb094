"""8-bit linear layers against bf16 cuBLAS, `torch._int_mm`, fp8 `torch._scaled_mm` and bitsandbytes, paired in one run.

LLM.int8() with threshold 6 and 0, 6 and 200 outlier columns in the input, and `int8_activations=False`. Every figure's
result is compared first: what reads the weight in 8 bits with its own decoded weight in float64, and what quantizes the
activations too with the plain-torch reference. bitsandbytes looks at the data from the host, so it is timed as a user
calls it; the others from CUDA graphs, and kbit both ways.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kbit
from benchmarks import timing, verify
from benchmarks.linear4bit import Weights, bf16_weights, product
from benchmarks.registry import register
from kbit.formats import blocks
from kbit.ops import choose, reference

SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096)]
TOKENS = [1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
OUTLIERS = [0, 6, 200]
THRESHOLD = 6.0
TOLERANCE = 6e-3  # bf16 in and out, against the same codes in float64
WHOLE = 5e-2  # everything against the bf16 weight in float64: int8 and fp8 round the operands


def activations(m: int, k: int, outliers: int) -> Tensor:
    """bf16 `[M, K]` below the threshold, but for `outliers` columns that are 20 times as large."""
    x = torch.randn(m, k, device="cuda").clamp(-4, 4)
    x[:, torch.randperm(k, device="cuda")[:outliers]] *= 20
    return x.to(torch.bfloat16)


def kbit_weights(weight: Tensor, int8_activations: bool | None = None) -> tuple[Weights, Tensor, Tensor]:
    """(layers, codes int8, scales fp32)"""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    copies = timing.copies_for(weight.numel())
    layers = [kbit.Linear8bit.from_linear(linear, THRESHOLD, int8_activations=int8_activations) for _ in range(copies)]
    codes, absmax = layers[0].weight.data, layers[0].absmax.data.view(torch.float32)
    oracle = blocks.quantize_int8(weight[:64].cpu())
    verify.require_equal("quantize int8", codes[:64].cpu(), oracle[0])
    verify.require_equal("scales of int8", absmax[:64].cpu(), oracle[1])
    return Weights(lambda x, i: layers[i](x), copies), codes, absmax


def expected_product(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """What kbit has to give: with 16-bit activations at few tokens, LLM.int8() of the reference at many."""
    if choose.linear_8bit_path("cuda", x.shape[0]) == "weight_only":
        return product(codes.double() * absmax.double()[:, None] / 127, x)
    return torch.cat([reference.llm_int8(part, codes, absmax, THRESHOLD) for part in x.split(1024)])


def bitsandbytes_weights(weight: Tensor) -> Weights | None:
    """bitsandbytes' Linear8bitLt; None where it is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    n, k = weight.shape
    layers = []
    for _ in range(timing.copies_for(weight.numel())):
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=THRESHOLD)
        layer.weight = bnb.nn.Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
        layers.append(layer.cuda())
    return Weights(lambda x, i: layers[i](x), len(layers))


def other_calls(weight: Tensor, codes: Tensor, copies: int) -> dict[str, Callable[[Tensor], Weights]]:
    """What multiplies in 8 bits and does less: no scales, or one scale for a whole matrix, and no outliers."""
    int8 = [codes.clone() for _ in range(copies)]
    scale = weight.abs().amax().float() / 448
    fp8 = [(weight.float() / scale).to(torch.float8_e4m3fn) for _ in range(copies)]

    def int_mm(x: Tensor) -> Weights:
        a = blocks.quantize_int8(x)[0]
        return Weights(lambda _, i: torch._int_mm(a, int8[i].t()), copies)

    def scaled_mm(x: Tensor) -> Weights:
        own = x.abs().amax().float() / 448
        a = (x.float() / own).to(torch.float8_e4m3fn)
        return Weights(
            lambda _, i: torch._scaled_mm(a, fp8[i].t(), scale_a=own, scale_b=scale, out_dtype=torch.bfloat16), copies
        )

    return {"torch._int_mm": int_mm, "torch._scaled_mm fp8": scaled_mm}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for n, k in args.shapes or SHAPES:
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        dense, (ours, codes, absmax), theirs = bf16_weights(weight), kbit_weights(weight), bitsandbytes_weights(weight)
        sixteen, _, _ = kbit_weights(weight, int8_activations=False)
        others = other_calls(weight, codes, timing.copies_for(weight.numel()))
        chain = max(dense.copies, ours.copies, 8)
        for m in args.tokens or TOKENS:
            row: dict[str, Any] = {"n": n, "k": k, "m": m}
            with torch.no_grad():
                for count in OUTLIERS:
                    x = activations(m, k, count)
                    exact = product(weight.float(), x)
                    what = f"{n} x {k}, {m} tokens, {count} outliers"
                    expected = expected_product(x, codes, absmax)
                    error = verify.require_close(f"kbit int8, {what}", ours.call(x, 0), expected, TOLERANCE)
                    whole = verify.require_close(f"kbit int8, {what}", ours.call(x, 0), exact, WHOLE)
                    verify.require_close(f"bf16, {what}", dense.call(x, 0), exact, TOLERANCE)
                    label = f"kbit int8, {count} outliers"
                    # bf16 right before and after: a GPU at its power limit is not equally fast all the time.
                    before = timing.graph(dense.calls(x, chain), args.repetitions)
                    time = timing.graph(ours.calls(x, chain), args.repetitions)
                    after = timing.graph(dense.calls(x, chain), args.repetitions)
                    row[label] = {
                        **time.to_json(),
                        "bf16_us": round((before.us + after.us) / 2, 3),
                        "eager_us": round(timing.eager(ours.calls(x, chain), args.repetitions).us, 3),
                        "error": float(f"{error:.3g}"),
                        "error_of_bf16_product": float(f"{whole:.3g}"),
                    }
                    if theirs is not None and count in (0, 6):
                        error = verify.require_close(f"bitsandbytes, {what}", theirs.call(x, 0), exact, WHOLE)
                        row[f"bitsandbytes int8, {count} outliers"] = {
                            **timing.eager(theirs.calls(x, chain), min(args.repetitions, 5)).to_json(),
                            "error_of_bf16_product": float(f"{error:.3g}"),
                        }
                    if count:
                        continue
                    row["bf16"] = before.to_json()
                    if m > choose.GPU_WEIGHT_ONLY_TOKENS:
                        own = product(codes.double() * absmax.double()[:, None] / 127, x)
                        verify.require_close(f"16-bit activations, {what}", sixteen.call(x, 0), own, TOLERANCE)
                        row["kbit int8, 16-bit activations"] = timing.graph(
                            sixteen.calls(x, chain), args.repetitions
                        ).to_json()
                    for label, build in others.items():
                        if m < 32:  # _int_mm refuses fewer than 17 rows
                            continue
                        form = build(x)
                        if label.endswith("fp8"):
                            verify.require_close(f"{label}, {what}", form.call(x, 0), exact, WHOLE)
                        row[label] = timing.graph(form.calls(x, chain), args.repetitions).to_json()
            for value in row.values():
                if isinstance(value, dict):
                    value["speed_over_bf16"] = round(value.get("bf16_us", row["bf16"]["us"]) / value["us"], 3)
            rows.append(row)
            labels = [key for key in row if isinstance(row[key], dict)]
            print(f"{n:6} x {k:5} {m:5}  " + "  ".join(f"{lb} {row[lb]['us']:.1f}" for lb in labels), flush=True)
        del dense, ours, sixteen, theirs, others
        torch.cuda.empty_cache()
    return rows


def block_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantize and dequantize 2^28 bf16 values; bytes are codes, scales and values, each once."""
    x = torch.randn(1 << 16, 4096, device="cuda", dtype=torch.bfloat16)
    codes, absmax = torch.ops.kbit.quantize_int8(x)
    verify.require_equal("quantize int8", codes[-64:].cpu(), blocks.quantize_int8(x[-64:].cpu())[0])
    back = torch.ops.kbit.dequantize_int8(codes, absmax, x.dtype)
    verify.require_equal("dequantize int8", back[-64:], blocks.dequantize_int8(codes[-64:], absmax[-64:], x.dtype))
    del back
    moved = x.nbytes + codes.nbytes + absmax.nbytes
    calls: dict[str, Any] = {
        "kbit quantize int8": lambda: torch.ops.kbit.quantize_int8(x),
        "kbit dequantize int8": lambda: torch.ops.kbit.dequantize_int8(codes, absmax, x.dtype),
    }
    rows = []
    for label, call in calls.items():
        time = timing.graph([call], args.repetitions)
        rows.append({"operation": label, **time.to_json(), "gb_a_second": round(moved / time.us / 1e3)})
        print(f"{label:24} {time.us:9.1f} us  {rows[-1]['gb_a_second']} GB/s", flush=True)
    return rows


def gradients(layer: torch.nn.Module, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """One forward and backward: gradients to the input and to the weight."""
    return torch.autograd.grad(layer(x), (x, weight), grad)


def training_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward of one layer that trains its weight, as a user calls it."""
    rows = []
    for n, k in args.shapes or SHAPES[:2]:
        for m in (2048, 8192):
            linear = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
            x = activations(m, k, 0).requires_grad_()
            grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
            layers: dict[str, torch.nn.Module] = {
                "bf16": linear,
                "SwitchBackLinear": kbit.SwitchBackLinear.from_linear(linear),
                "SwitchBackLinear, 16-bit gradient": kbit.SwitchBackLinear.from_linear(linear, int8_gradient=False),
            }
            row: dict[str, Any] = {"n": n, "k": k, "m": m}
            exact: tuple[Tensor, ...] = ()
            for label, layer in layers.items():
                found = gradients(layer, x, linear.weight, grad)
                exact = exact or found
                for name, ours, theirs in zip(("input", "weight"), found, exact, strict=True):
                    verify.require_close(f"gradient to the {name} of {label}", ours, theirs, WHOLE)
                step = functools.partial(gradients, layer, x, linear.weight, grad)
                row[label] = timing.eager([step] * 4, args.repetitions).to_json()
            rows.append(row)
            print(f"{n:6} x {k:5} {m:5}  " + "  ".join(f"{lb} {row[lb]['us']:.0f}" for lb in layers), flush=True)
    return rows


def plot(result: dict[str, Any], path: str) -> None:
    """Speed over bf16 against tokens, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in result["rows"]))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4.6 * len(shapes), 4.2), sharey=True, squeeze=False)
    for axis, (n, k) in zip(axes[0], shapes, strict=True):
        rows = [row for row in result["rows"] if (row["n"], row["k"]) == (n, k)]
        labels = dict.fromkeys(key for row in rows for key in row if isinstance(row[key], dict) and key != "bf16")
        for label in labels:
            held = [row for row in rows if label in row]
            style = "--" if label.startswith("bitsandbytes") else "-"
            speeds = [row[label]["speed_over_bf16"] for row in held]
            axis.plot([row["m"] for row in held], speeds, style, marker="o", ms=3, label=label)
        axis.axhline(1.0, color="grey", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{n} x {k}", fontsize=10)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed over bf16 cuBLAS")
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=4, fontsize=8)
    figure.suptitle(f"LLM.int8() linear layers, bf16 input, {result['device']}", fontsize=11)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


@register("linear8bit", plot)
def run(args: argparse.Namespace) -> dict[str, Any]:
    return {"rows": measure(args), "blocks": block_rows(args), "training": training_rows(args)}
