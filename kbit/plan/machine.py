"""What this machine has: packages, processor, accelerators, memory. Probes nothing until asked."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Flags of /proc/cpuinfo that decide between CPU kernels, with the names people know them by.
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512F",
    "avx512bw": "AVX-512BW",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "asimddp": "dot product",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "SVE",
}

# What doctor lists: distribution name -> what it is for, said where it is missing.
PACKAGES = {
    "torch": "everything",
    "safetensors": "checkpoints",
    "transformers": "models of the hub: pip install 'kbit[hf]'",
    "accelerate": "device_map: pip install 'kbit[hf]'",
    "peft": "LoRA: pip install 'kbit[peft]'",
    "triton": "GPU kernels: pip install 'kbit[triton]'",
    "matplotlib": "plots of the report: pip install 'kbit[report]'",
    "jinja2": "the report: pip install 'kbit[report]'",
}


@dataclasses.dataclass(frozen=True)
class Device:
    """One place a model can live. memory: bytes in all; free: bytes free now, None where it cannot be told."""

    name: str
    model: str
    memory: int | None
    free: int | None
    details: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def versions() -> dict[str, str | None]:
    """Version of each package that kbit can use; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[Device]:
    """The CPU, then every accelerator that torch can use."""
    return [_cpu(), *_cuda(), *_others()]


def _cpu() -> Device:
    import torch

    fields = _cpuinfo()
    names = (fields.get("model name"), _sysctl("machdep.cpu.brand_string"), platform.processor(), platform.machine())
    model = next((name for name in names if name), "unknown")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    sets = [name for flag, name in _INSTRUCTION_SETS.items() if flag in flags]
    total, free = _ram()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    capability = torch.backends.cpu.get_cpu_capability()
    return Device(
        "cpu", model, total, free, f"{usable} cores; {', '.join(sets) or platform.machine()}; torch uses {capability}"
    )


def _cuda() -> Iterator[Device]:
    import torch

    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free: int | None
        try:
            free = torch.cuda.mem_get_info(index)[0]
        except RuntimeError:  # exclusive mode, or another process holds it
            free = None
        if torch.version.hip:
            kind = f"{getattr(properties, 'gcnArchName', 'AMD')}, ROCm {torch.version.hip}"
        else:
            kind = f"compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        yield Device(f"cuda:{index}", properties.name, properties.total_memory, free, kind)


def _others() -> Iterator[Device]:
    import torch

    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        for index in range(xpu.device_count()):
            properties = xpu.get_device_properties(index)
            yield Device(f"xpu:{index}", properties.name, properties.total_memory, None, "Intel GPU")
    if torch.backends.mps.is_available():
        total, free = _ram()
        yield Device("mps", "Apple GPU", total, free, "memory shared with the CPU")


def why_no_gpu() -> str | None:
    """One line on why torch sees no accelerator; None where it sees one."""
    import torch

    if len(devices()) > 1:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU only"
    driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists()
    return "torch finds no usable GPU, though a driver is loaded" if driver else "no GPU driver is loaded"


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return fields
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields


def _sysctl(key: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    import subprocess

    result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _ram() -> tuple[int | None, int | None]:
    """(total, available) bytes of main memory, a container's limit respected."""
    total = free = None
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key == "MemTotal":
                total = int(value.split()[0]) * 1024
            elif key == "MemAvailable":
                free = int(value.split()[0]) * 1024
    except OSError:
        size = _sysctl("hw.memsize")
        return (int(size) if size else None), None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if total is not None and limit < total:
            total, free = limit, min(limit, free) if free is not None else None
    return total, free


def best_device() -> Device:
    """Where a model would be put: the first accelerator, or the CPU."""
    found = devices()
    return found[1] if len(found) > 1 else found[0]
