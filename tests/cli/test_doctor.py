"""`kbit doctor`: one line for each version, device and backend."""

from __future__ import annotations

import platform

import pytest
import torch

import kbit
from kbit.ops import backends
from kbit.plan import machine


def test_one_line_each(kbit_cli) -> None:  # type: ignore[no-untyped-def]
    result = kbit_cli("doctor")
    assert result.code == 0 and result.err == ""
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.startswith("  ")}
    assert kbit.__version__ in lines["kbit"]
    assert torch.__version__ in lines["torch"]
    assert platform.python_version() in lines["python"]
    assert "cores" in lines["cpu"] and "GB" in lines["cpu"]
    for backend in backends():
        assert ("active" in lines[backend.name].split()[1]) == backend.active
        assert backend.reason in lines[backend.name]


def test_json(kbit_cli) -> None:  # type: ignore[no-untyped-def]
    data = kbit_cli("doctor", "--json").json()
    assert data["versions"]["torch"] == torch.__version__
    assert data["devices"][0]["name"] == "cpu" and data["devices"][0]["memory"] > 0
    assert [b["name"] for b in data["backends"]] == [b.name for b in backends()]
    assert any(b["active"] for b in data["backends"]) and all(b["reason"] for b in data["backends"])
    if not torch.cuda.is_available():
        assert data["no_gpu"]


@pytest.mark.parametrize(
    ("gpu", "cuda", "reason"),
    [
        (None, "13.0", "no GPU that torch can use"),
        (None, None, "no GPU that torch can use"),
        ("cuda", None, "no NVIDIA GPU; Triton serves"),  # AMD, which torch calls cuda too
        ("xpu", None, "no NVIDIA GPU; Triton serves"),
        ("cuda", "13.0", "no Hopper GPU (compute capability 9.0); Triton serves"),
    ],
)
def test_why_cuda_kernels_do_not_serve(monkeypatch, gpu, cuda, reason) -> None:  # type: ignore[no-untyped-def]
    """Triton serves only where there is a GPU for it."""
    from kbit.ops import cuda as backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu == "cuda")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: gpu == "xpu")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend.why_not.__wrapped__() == reason


def test_a_missing_package_is_named_with_its_remedy(kbit_cli, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(machine, "PACKAGES", {"no-such-package": "nothing: pip install nothing"})
    line = next(line for line in kbit_cli("doctor").out.splitlines() if "no-such-package" in line)
    assert "not installed (nothing: pip install nothing)" in line


def test_a_container_limit_counts(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A cgroup that allows less than the machine has is the memory there is."""
    limit = tmp_path / "memory.max"
    limit.write_text("1000000000\n")
    real = machine.Path

    def redirect(path: str) -> object:
        return limit if str(path) == "/sys/fs/cgroup/memory.max" else real(path)

    monkeypatch.setattr(machine, "Path", redirect)
    total, free = machine._ram()
    assert total is None or (total == 1_000_000_000 and free is not None and free <= total)
