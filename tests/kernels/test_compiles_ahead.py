"""Default tiles compiled for GPUs that are not here: they must fit shared memory and keep their values in registers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kbit.kernels.triton import tiles
from kbit.kernels.triton.linear_4bit import linear_4bit_kernel, stages_of

dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
pointers = {"x": "fp16", "packed": "u8", "absmax": "u8", "nested_absmax": "fp32", "offset": "fp32",
            "scale_table": "fp32", "values": "fp16", "bias": "fp16", "out": "fp32"}
sizes = ("M", "N", "K", "stride_x", "steps_a_split")
for capability, limit, rule, flat in ((80, 163, 0, 0), (89, 99, 0, 1), (89, 99, 2, 0)):
    tile = tiles.rules("none")["linear_4bit"][rule]
    constants = {"NESTED": True, "BIAS": False, "BLOCK": 64, "ROWS": not flat, "BM": tile["bm"], "BN": tile["bn"],
                 "BK": min(tile["bk"], 64), "SPLIT": 4}
    kinds = {**{name: "*" + kind for name, kind in pointers.items()}, **dict.fromkeys(sizes, "i32"),
             **dict.fromkeys(constants, "constexpr")}
    if flat:
        kinds["values"] = "*fp32"
    attributes = {(i,): [["tt.divisibility", 16]] for i in [*range(9), 10, 11, 12]}
    source = ASTSource(linear_4bit_kernel, kinds, constants, attributes)
    stages = stages_of(tile["stages"], not flat)
    options = {"num_warps": tile["warps"], "num_stages": stages, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"]), file.flush()
        usage = subprocess.run([dump, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    stack = int(re.search(r"STACK:(\\d+)", usage)[1])
    print(capability, "flat" if flat else "rows", kernel.metadata.shared, usage.strip().splitlines()[-1])
    assert kernel.metadata.shared <= limit * 1024, kernel.metadata.shared
    assert stack == 0, usage
print("compiled ahead")
"""


def test_default_tiles_of_the_product_fit_ampere_and_ada(tmp_path):
    pytest.importorskip("triton.backends.nvidia", reason="no NVIDIA compiler on this platform", exc_type=ImportError)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    path = tmp_path / "script.py"  # the compiler reads the source of what it compiles
    path.write_text(SCRIPT)
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "compiled ahead" in done.stdout, done.stdout + done.stderr[-3000:]
