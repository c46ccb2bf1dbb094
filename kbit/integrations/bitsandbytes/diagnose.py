"""What `python -m bitsandbytes` prints: that it is kbit, what serves this machine, and a check that it computes."""

from __future__ import annotations

import platform

import torch

import kbit
from kbit.integrations.bitsandbytes.identity import VERSION
from kbit.ops import backends


def report() -> list[str]:
    """Lines about this installation."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    lines = [
        f"bitsandbytes {VERSION}: kbit {kbit.__version__}, from {kbit.__file__}",
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {device}",
    ]
    lines += [f"{b.name}: {'in use' if b.active else 'not in use'} ({b.reason})" for b in backends()]
    return lines


def self_test() -> str | None:
    """None where quantizing, a product and an optimizer step work on the default device; else what went wrong."""
    from kbit.integrations.bitsandbytes.linear import Linear4bit, Linear8bitLt
    from kbit.integrations.bitsandbytes.optim import AdamW8bit  # type: ignore[attr-defined]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        x = torch.randn(4, 64, device=device)
        for layer in (Linear4bit(64, 64, quant_type="nf4"), Linear8bitLt(64, 64, has_fp16_weights=False)):
            weight = layer.weight.detach().clone().to(device)
            error = (layer.to(device)(x) - x @ weight.t() - layer.bias).abs().max()
            if not error < 0.5:
                return f"{type(layer).__name__} is off by {float(error):.3f}"
        p = torch.nn.Parameter(torch.ones(8192, device=device))
        p.grad = torch.ones_like(p)
        AdamW8bit([p], lr=0.1).step()
        if not bool((p < 1).all()):
            return "AdamW8bit did not move its parameter"
    except Exception as error:  # whatever it is, it is the finding
        return f"{type(error).__name__}: {error}"
    return None


def main() -> int:
    """Print the report; exit code 1 where the check fails."""
    print("\n".join(report()))
    problem = self_test()
    print("self test: " + (problem or "4-bit and 8-bit layers and an 8-bit optimizer work"))
    return 1 if problem else 0
