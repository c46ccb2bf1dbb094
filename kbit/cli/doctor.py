"""`kbit doctor`: what is installed, what this machine has, and which kernels serve it."""

from __future__ import annotations

import platform
from typing import Annotated

import typer

from kbit.cli.app import app
from kbit.cli.common import format_bytes, print_json


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Versions, devices, and which kernels are in use here; why the others are not."""
    import kbit
    from kbit.ops import backends
    from kbit.plan import machine

    versions = {"kbit": kbit.__version__, "python": platform.python_version(), **machine.versions()}
    devices = machine.devices()
    no_gpu = machine.why_no_gpu()
    kernels = backends()
    if as_json:
        print_json(
            {
                "versions": versions,
                "devices": [device.to_json() for device in devices],
                "no_gpu": no_gpu,
                "backends": [{"name": b.name, "active": b.active, "reason": b.reason} for b in kernels],
            }
        )
        return

    print("versions")
    for name, version in versions.items():
        print(f"  {name:<13} {version or f'not installed ({machine.PACKAGES[name]})'}")
    print("devices")
    for device in devices:
        memory = "memory unknown" if device.memory is None else format_bytes(device.memory)
        free = "" if device.free is None else f" ({format_bytes(device.free)} free)"
        print(f"  {device.name:<13} {device.model}, {memory}{free}; {device.details}")
    if no_gpu is not None:
        print(f"  {'no GPU':<13} {no_gpu}")
    print("backends")
    for backend in kernels:
        print(f"  {backend.name:<13} {'active' if backend.active else 'off   '}  {backend.reason}")
