"""4-bit linear layers against bf16 cuBLAS and bitsandbytes, paired in one run, over Llama-3 shapes, 1 to 4096 tokens.

Also quantize and dequantize, in bytes moved a second. Every figure's result is compared with the product in float64
(weights from the plain-torch oracle) before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kbit
from benchmarks import timing, verify
from benchmarks.registry import register
from kbit.formats import blocks, double
from kbit.formats.spec import Format

# N x K of Llama-3 8B (down, up and gate, query and output, key and value) and 70B, without tensor parallelism.
SHAPES = [
    (14336, 4096),
    (4096, 14336),
    (4096, 4096),
    (1024, 4096),
    (28672, 8192),
    (8192, 28672),
    (8192, 8192),
    (1024, 8192),
]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
GRADIENT_SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096)]
GRADIENT_TOKENS = [32, 128, 512, 1024, 4096]
# bf16 weights, inputs and outputs: each rounding is 2^-9 at most.
TOLERANCE = 6e-3


@dataclasses.dataclass
class Weights:
    """Copies of one weight in a form, and a function that multiplies with copy i."""

    call: Any
    copies: int

    def calls(self, x: Tensor, count: int) -> list[Any]:
        """A chain of `count` products that walks through the copies. Every form gets chains of one length: a GPU at its
        power limit slows down while it works, so a short chain would look faster."""
        return [lambda i=i: self.call(x, i % self.copies) for i in range(count)]


def bf16_weights(weight: Tensor) -> Weights:
    copies = timing.copies_for(weight.nbytes)
    held = [weight.clone() for _ in range(copies)]
    return Weights(lambda x, i: F.linear(x, held[i]), copies)


def kbit_weights(weight: Tensor, fmt: Format) -> tuple[Weights, Tensor]:
    """(layers, the oracle's decoded weight in fp32)."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    copies = timing.copies_for(fmt.nbytes(weight.shape))
    layers = [kbit.nn.Linear4bit.from_linear(linear, fmt) for _ in range(copies)]
    q = layers[0].quantized_weight()
    absmax = q.absmax
    if q.nested_absmax is not None and q.nested_offset is not None:
        absmax = double.dequantize_absmax(q.absmax, q.nested_absmax, q.nested_offset)
    decoded = blocks.dequantize_4bit(q.codes, absmax, fmt.name, fmt.block_size, weight.shape, torch.float32)
    return Weights(lambda x, i: layers[i](x), copies), decoded


def bitsandbytes_weights(weight: Tensor, name: str) -> tuple[Weights, Tensor] | None:
    """bitsandbytes' functional path, double-quantized; None where it is not installed."""
    try:
        import bitsandbytes as bnb
        import bitsandbytes.functional as functional
    except ImportError:
        return None
    quantized = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=name)
    copies = timing.copies_for(weight.numel() // 2)
    held = [(quantized[0].clone(), quantized[1]) for _ in range(copies)]
    decoded = functional.dequantize_4bit(*quantized).float()
    return Weights(lambda x, i: bnb.matmul_4bit(x, held[i][0].t(), quant_state=held[i][1]), copies), decoded


def product(decoded: Tensor, x: Tensor) -> Tensor:
    """The product in float64, in slices of tokens that bound its memory."""
    w = decoded.double()
    return torch.cat([part.double() @ w.t() for part in x.split(1024)])


def linear_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for n, k in args.shapes or SHAPES:
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        forms: dict[str, tuple[Weights, Tensor]] = {"bf16": (bf16_weights(weight), weight.float())}
        for name in args.formats:
            forms[f"kbit {name}"] = kbit_weights(weight, Format.parse(name))
        theirs = bitsandbytes_weights(weight, "nf4")
        if theirs is not None:
            forms["bitsandbytes nf4"] = theirs
        most = min(24, max(weights.copies for weights, _ in forms.values()))
        for m in args.tokens or TOKENS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            row: dict[str, Any] = {"n": n, "k": k, "m": m}
            chain = most if m <= 512 else min(most, 10)  # milliseconds each
            with torch.no_grad():
                for label, (weights, decoded) in forms.items():
                    what = f"{label}, {n} x {k}, {m} tokens"
                    error = verify.require_close(what, weights.call(x, 0), product(decoded, x), TOLERANCE)
                    time = timing.graph(weights.calls(x, chain), args.repetitions)
                    row[label] = {**time.to_json(), "error": float(f"{error:.3g}")}
            for label in forms:
                row[label]["speed_over_bf16"] = round(row["bf16"]["us"] / row[label]["us"], 3)
            rows.append(row)
            print(
                f"{n:6} x {k:5}  {m:5} tokens  " + "  ".join(f"{lb} {row[lb]['us']:.1f} us" for lb in forms), flush=True
            )
        del forms, theirs
        torch.cuda.empty_cache()
    return rows


def gradient_row(n: int, k: int, m: int, repetitions: int, dense: list[Tensor], parts: list[Any]) -> dict[str, Any]:
    """dense: copies of the weight; parts: copies of its codes and scales."""
    grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)

    def decoded(i: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.ops.kbit.dequantize_4bit(*parts[i % len(parts)], "nf4", 64, [n, k], dtype)

    def ours(i: int) -> Tensor:
        return torch.ops.kbit.linear_4bit_grad_input(grad, *parts[i % len(parts)], "nf4", 64, k)

    calls = {
        "bf16": lambda i: grad @ dense[i % len(dense)],
        "decode first": lambda i: grad @ decoded(i),
        "kbit nf4": ours,
    }
    what = f"gradient, {n} x {k}, {m} tokens"
    error = verify.require_close(what, ours(0), grad.double() @ decoded(0, torch.float32).double(), TOLERANCE)
    row: dict[str, Any] = {"n": n, "k": k, "m": m, "error": float(f"{error:.3g}")}
    for label, call in calls.items():
        chain = [functools.partial(call, i) for i in range(16 if m <= 512 else 8)]
        row[label] = timing.graph(chain, repetitions).to_json()
    for label in ("decode first", "kbit nf4"):
        row[label]["speed_over_bf16"] = round(row["bf16"]["us"] / row[label]["us"], 3)
    print(f"{what}: " + "  ".join(f"{label} {row[label]['us']:.1f} us" for label in calls), flush=True)
    return row


def gradient_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The gradient's product `grad [M, N] W [N, K]`: bf16, the weight decoded first, and what the operator chooses."""
    rows = []
    for n, k in args.shapes or GRADIENT_SHAPES:
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        dense = [weight.clone() for _ in range(timing.copies_for(weight.nbytes))]
        fmt = Format.parse("nf4")
        q = kbit.quantize(weight, fmt)
        tensors = (q.codes, q.absmax, q.nested_absmax, q.nested_offset)
        parts = [[t.clone() for t in tensors if t is not None] for _ in range(timing.copies_for(fmt.nbytes(q.shape)))]
        for m in args.tokens or GRADIENT_TOKENS:
            rows.append(gradient_row(n, k, m, args.repetitions, dense, parts))
        del dense, parts
        torch.cuda.empty_cache()
    return rows


def block_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantize and dequantize 2^28 bf16 values; bytes are codes, scales and values, each once."""
    x = torch.randn(1 << 16, 4096, device="cuda", dtype=torch.bfloat16)
    head = x[:64]
    rows = []
    for name in args.formats:
        fmt = Format.parse(name)
        q = kbit.quantize(head, fmt)
        oracle = blocks.quantize_4bit(head.cpu(), fmt.name, fmt.block_size)
        verify.require_equal(f"quantize {name}", q.codes.cpu().view(-1), oracle[0])
        absmax = (
            q.absmax
            if q.nested_absmax is None
            else double.dequantize_absmax(q.absmax, q.nested_absmax, q.nested_offset)
        )
        exact = blocks.dequantize_4bit(q.codes, absmax, fmt.name, fmt.block_size, head.shape, torch.bfloat16)
        verify.require_equal(f"dequantize {name}", q.dequantize(), exact)
        q = kbit.quantize(x, fmt)
        moved = x.nbytes + q.nbytes
        plain = x.nbytes + x.numel() // 2 + x.numel() // 16

        ours = timing.graph([lambda name=fmt.name: torch.ops.kbit.quantize_4bit(x, name, 64)], args.repetitions)
        rows.append(
            {"operation": f"kbit quantize {fmt.name}", **ours.to_json(), "gb_a_second": round(plain / ours.us / 1e3)}
        )
        back = timing.graph([lambda q=q: q.dequantize()], args.repetitions)
        rows.append(
            {"operation": f"kbit dequantize {name}", **back.to_json(), "gb_a_second": round(moved / back.us / 1e3)}
        )
        try:
            import bitsandbytes.functional as functional
        except ImportError:
            continue
        theirs = timing.eager([lambda name=fmt.name: functional.quantize_4bit(x, blocksize=64, quant_type=name)], 5)
        packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=fmt.name)
        undone = timing.eager([lambda p=packed, s=state: functional.dequantize_4bit(p, s)], 5)
        for label, time in (
            (f"bitsandbytes quantize {fmt.name}", theirs),
            (f"bitsandbytes dequantize {fmt.name}", undone),
        ):
            rows.append({"operation": label, **time.to_json(), "gb_a_second": round(plain / time.us / 1e3)})
    for row in rows:
        print(f"{row['operation']:30} {row['us']:9.1f} us  {row['gb_a_second']} GB/s", flush=True)
    return rows


def plot(result: dict[str, Any], path: str) -> None:
    """Speed over bf16 against tokens, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in result["rows"]))
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), sharey=True, squeeze=False)
    for axis, (n, k) in zip(axes.flat, shapes, strict=False):
        rows = [row for row in result["rows"] if (row["n"], row["k"]) == (n, k)]
        for label in [key for key in rows[0] if isinstance(rows[0][key], dict) and key != "bf16"]:
            axis.plot(
                [r["m"] for r in rows], [r[label]["speed_over_bf16"] for r in rows], marker="o", ms=3, label=label
            )
        axis.axhline(1.0, color="grey", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{n} x {k}", fontsize=10)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("speed over bf16 cuBLAS")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"4-bit linear layers, bf16 input, {result['device']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@register("linear4bit", plot)
def run(args: argparse.Namespace) -> dict[str, Any]:
    return {"rows": linear_rows(args), "gradient": gradient_rows(args), "blocks": block_rows(args)}
