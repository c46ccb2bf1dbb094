"""Seconds from a new process to the first output of a 4-bit layer, with empty caches of compiled kernels and again.

Each run is a process of its own, as a user's first one is: import, CUDA context, quantize a 4096 x 4096 weight, one
token, 512 tokens, the gradient of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.registry import register

SCRIPT = """
import json, time
begin = time.perf_counter()
import torch, kbit
torch.zeros(1, device="cuda"), torch.cuda.synchronize()
marks = {}
def mark(name):
    global begin
    torch.cuda.synchronize()
    now = time.perf_counter()
    marks[name], begin = round(now - begin, 3), now
mark("import and context")
linear = torch.nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16)
linear(x)
mark("the same in bf16")
layer = kbit.Linear4bit.from_linear(linear)
mark("quantize")
with torch.no_grad():
    one = layer(x[:1])
mark("one token")
x.requires_grad_()
out = layer(x)
mark("512 tokens")
out.backward(torch.ones_like(out))
mark("gradient")
exact = x.detach().double() @ layer.dequantize(torch.float32).double().T
for got, expected in ((one, exact[:1]), (out.detach(), exact)):
    assert (got.double() - expected).norm() < 8e-3 * expected.norm()
print(json.dumps(marks))
"""


@register("cold_start")
def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "KBIT_CACHE": f"{folder}/kbit",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "CUDA_CACHE_PATH": f"{folder}/cuda",
        }
        for label in ("empty caches", "again"):
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT], env={**os.environ, **caches}, capture_output=True, text=True, check=True
            )
            row = {"run": label, "seconds": json.loads(done.stdout)}
            rows.append(row)
            print(label, row["seconds"], flush=True)
    return {"rows": rows}
