"""Run optim.cu without a GPU: the source compiled for the host, one warp as 32 threads, against the plain rules.

`python cuda_on_host.py [pytest arguments]` runs triton_checks.py so. What means nothing outside a GPU (inline assembly,
warp functions) is replaced function by function; the rest is the kernel's own text. Needs g++ on x86-64.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import optim as kernel

SOURCE = Path(kernel.__file__).with_suffix(".cu")
HEADER = Path(__file__).with_name("cuda_on_host.h")
FOLDER = Path(tempfile.mkdtemp(prefix="kbit-cuda-on-host-"))

# Function of the kernel, by its first line -> what it does on a host.
REPLACED = {
    "__device__ __forceinline__ float root(": "inline float root(float x) { return sqrtf(x); }",
    "__device__ __forceinline__ float quotient(": "inline float quotient(float x, float y) { return x / y; }",
    "__device__ __forceinline__ float larger(": "inline float larger(float a, float b) { return host_larger(a, b); }",
    "__device__ __forceinline__ u32 permute(":
        "inline u32 permute(u32 a, u32 b, u32 c) { return host_permute(a, b, c); }",
    "template <int BYTES>\n__device__ __forceinline__ void load(":
        "template <int BYTES> void load(u32* to, i64 from) { memcpy(to, (void*)from, BYTES); }",
    "template <int BYTES>\n__device__ __forceinline__ void store(":
        "template <int BYTES> void store(const u32* from, i64 to) { memcpy((void*)to, from, BYTES); }",
    "template <int SIZE>\n__device__ __forceinline__ void expect_block(":
        "template <int SIZE> void expect_block(i64, u32) {}",
    "template <int KIND>\n__device__ __forceinline__ float to_float(":
        "template <int KIND> float to_float(u32 bits) { return host_float(KIND, bits); }",
    "template <int KIND>\n__device__ __forceinline__ u32 pack(":
        "template <int KIND> u32 pack(float a, float b) { return host_bits(KIND, a) | host_bits(KIND, b) << 16; }",
}  # fmt: skip
LINES = {
    'asm("mul.ftz.f32 %0, %1, %2;" : "=f"(a) : "f"(x), "f"(inverse));': "a = host_flush(x * inverse);",
    'asm("fma.rp.ftz.f32 %0, %1, %2, %3;" : "=f"(a) : "f"(x), "f"(inverse), "f"(SMALLEST));':
        "a = host_fma_up(x, inverse, SMALLEST);",
    'asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));': "y = 1.0f / x;",
    'asm volatile("griddepcontrol.wait;" ::: "memory");': "",
    "extern __shared__ __align__(1024) char memory[];": "",
}  # fmt: skip
ENTRY = """
extern "C" void run(const i64* table, int rows, int blocks, const u32* lookup, const Hyper* hyper, const void* lr,
                    const i64* counted, int counted_rows, u32* tickets) {
  host_warp([=] { optim(table, rows, blocks, lookup, *hyper, lr, counted, counted_rows, tickets); });
}
"""


def translated() -> str:
    """The kernel's text for a host compiler."""
    text = SOURCE.read_text()
    for name, header in compiler.with_headers(text, {}).items():
        text = text.replace(f'#include "{name}"', header)
    for start, replacement in REPLACED.items():
        begin = text.index(start)
        text = text[:begin] + replacement + text[text.index("\n}\n", begin) + 2 :]
    for line, replacement in LINES.items():
        assert line in text, line
        text = text.replace(line, replacement)
    assert "asm" not in text, "inline assembly without a host version"
    return text


@functools.cache
def library(settings: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    macros = {**dict(settings), "THREADS": 32, "CTAS": 1}
    path = FOLDER / f"{len(list(FOLDER.iterdir()))}.cpp"
    defines = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    path.write_text(defines + f'#include "{HEADER}"\n' + translated() + ENTRY)
    options = ["-O1", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-mf16c", "-mfma", "-w", "-pthread"]
    subprocess.run(["g++", *options, "-shared", "-fPIC", str(path), "-o", str(path.with_suffix(".so"))], check=True)
    return ctypes.CDLL(str(path.with_suffix(".so")))


def step(table, rows, blocks, counted, counted_rows, tickets, hyper, lr, settings):
    """In place of kbit.kernels.cuda.optim.step."""

    def pointer(tensor):
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    lookup = kernel.lookup(torch.device("cpu"))
    numbers = (ctypes.c_double * 16)(*hyper)
    library(settings).run(
        pointer(table), rows, blocks, pointer(lookup), numbers, pointer(lr), pointer(counted), counted_rows,
        pointer(tickets),
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.update(TRITON_INTERPRET="1", KBIT_CHECKED_STEP="cuda")
    kernel.step, kernel.available = step, lambda device: True
    checks = str(Path(__file__).with_name("triton_checks.py"))
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", checks, *sys.argv[1:]]))
