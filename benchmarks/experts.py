"""A Mixtral-shaped layer of experts (8, hidden 4096, intermediate 14336, top 2) in NF4, FP4 and int8 against bf16.

The whole experts forward, routing and weighted sum included, paired in one run with transformers' own in bf16: its
eager loop as a user calls it (it waits for the routing), its batched and its grouped product from CUDA graphs, and the
same timed both ways for kbit. Every output is compared with float64 over the decoded weights before it is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kbit
from benchmarks import timing, verify
from benchmarks.registry import register
from kbit.nn.experts import experts_forward

TOKENS = [1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096]
TOLERANCE = 2e-2  # three roundings to bf16 in a row: between the products, of the gate, of the sum
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4096, 14336, 8, 2


def mixtral_experts() -> nn.Module:
    """transformers' module of one layer's experts, bf16, on the GPU."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module = MixtralExperts(config)
    module = module.to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False).eval()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02)
    return module


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    scores, index = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K)
    return index, scores / scores.sum(dim=-1, keepdim=True)


def exact(module: nn.Module, decoded: dict[str, Tensor], x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """The layer in float64, expert by expert."""
    out = torch.zeros(x.shape[0], HIDDEN, device="cuda", dtype=torch.float64)
    for expert in range(EXPERTS):
        token, place = (index == expert).nonzero(as_tuple=True)
        if not token.numel():
            continue
        gate, up = (x[token].double() @ decoded["gate_up_proj"][expert].double().T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        out.index_add_(
            0, token, inner @ decoded["down_proj"][expert].double().T * scores[token, place].double()[:, None]
        )
    return out


def forwards(label: str, module: nn.Module) -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """{name: (forward(x, index, scores), whether it captures in a graph)}"""
    if label != "bf16":
        return {f"kbit {label}": (lambda *a: experts_forward(module, *a), True)}
    from transformers.integrations import moe

    found: dict[str, tuple[Callable[..., Tensor], bool]] = {"bf16 loop": (module.forward, False)}
    for name in ("batched_mm", "grouped_mm"):
        function = getattr(moe, f"{name}_experts_forward", None)
        if function is not None:
            found[f"bf16 {name}"] = (lambda *a, f=function: f(module, *a), True)
    return found


@register("experts")
@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    tokens = args.tokens or TOKENS
    cases = {m: (torch.randn(m, HIDDEN, device="cuda", dtype=torch.bfloat16), *routing(m)) for m in tokens}
    rows: dict[int, dict[str, Any]] = {m: {"tokens": m} for m in tokens}
    base = mixtral_experts()
    for label in ["bf16", *args.formats]:
        module = base
        if label != "bf16":
            holder = nn.Module()
            holder.experts = copy.copy(base)
            holder.experts._parameters = dict(base._parameters)
            holder.experts._modules = dict(base._modules)
            module = kbit.quantize_model(holder, kbit.KbitConfig.from_format(label)).experts
        decoded = {
            name: (w if isinstance(w := getattr(module, name), nn.Parameter) else w.dequantize(torch.bfloat16))
            for name in ("gate_up_proj", "down_proj")
        }
        for m, case in cases.items():
            expected = exact(module, decoded, *case)
            for name, (forward, captures) in forwards(label, module).items():
                if name == "bf16 batched_mm" and m > 16:  # it copies a weight for every row
                    continue
                error = verify.require_close(f"{name}, {m} tokens", forward(*case), expected, TOLERANCE)
                row: dict[str, Any] = {"error": float(f"{error:.3g}")}
                call = lambda forward=forward, case=case: forward(*case)  # noqa: E731
                row["eager"] = timing.eager([call] * 2, args.repetitions).to_json()
                if captures:  # a layer's weights exceed the L2 several times: calls need no other copy
                    row["graph"] = timing.graph([call] * 4, args.repetitions).to_json()
                rows[m][name] = row
        del decoded
    for row in rows.values():
        best = min(r[way]["us"] for name, r in row.items() if name.startswith("bf16") for way in r if way != "error")
        for name in [name for name in row if name.startswith("kbit")]:
            row[name]["speed_over_best_bf16"] = round(best / row[name]["graph"]["us"], 3)
            row[name]["speed_over_bf16_loop"] = round(row["bf16 loop"]["eager"]["us"] / row[name]["eager"]["us"], 3)
        parts = [
            f"{name} {r.get('graph', r['eager'])['us']:.0f}" + (f" ({r['eager']['us']:.0f})" if "graph" in r else "")
            for name, r in row.items()
            if name != "tokens"
        ]
        print(f"{row['tokens']:5} tokens, us (eager): " + ", ".join(parts), flush=True)
    shape = {"experts": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "top_k": TOP_K}
    return {"shape": shape, "rows": list(rows.values())}
