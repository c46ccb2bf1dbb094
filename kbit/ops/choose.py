"""Which kernel serves a product: pure functions of device, shape and format, testable without that device."""

from __future__ import annotations

# Up to this many tokens a product reads the int8 weights alone: the activations stay unquantized, which is both
# faster (memory bound) and more accurate. Above it, LLM.int8() multiplies in int8.
WEIGHT_ONLY_TOKENS = 16


def linear_8bit_path(device: str, m: int) -> str:
    """ "weight_only" or "llm_int8" for `m` tokens on a device type."""
    return "weight_only" if m <= WEIGHT_ONLY_TOKENS else "llm_int8"
