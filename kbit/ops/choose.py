"""Which kernel serves a product: pure functions of device, shape and format, testable without that device."""

from __future__ import annotations

# Up to this many tokens a product reads the int8 weights alone: the activations stay unquantized, which is both
# faster (memory bound) and more accurate. Above it, LLM.int8() multiplies in int8.
WEIGHT_ONLY_TOKENS = 16

# Up to this many tokens Triton decodes the 4-bit weight inside the product. Above it the tensor cores set the time, and
# decoding once, then multiplying with the vendor's library, is faster.
TRITON_TOKENS = 64
TRITON_GRAD_TOKENS = 16
# The Hopper kernel is no slower than decoding first up to here (measured on one H200; both meet between 1024 and 2048);
# where N is small there are too few tiles for that.
HOPPER_TOKENS = 1536


def linear_8bit_path(device: str, m: int) -> str:
    """ "weight_only" or "llm_int8" for `m` tokens on a device type."""
    return "weight_only" if m <= WEIGHT_ONLY_TOKENS else "llm_int8"


def linear_4bit_path(
    m: int, n: int, k: int, block_size: int, dtype_bytes: int, capability: tuple[int, int] | None, aligned: bool = True
) -> str:
    """How a GPU multiplies `m` tokens with a 4-bit `W [N, K]`: "hopper", "triton" or "dequantize".

    capability: of an NVIDIA GPU on which CUDA C++ can be compiled, else None. aligned: codes and input start on 16-byte
    boundaries and the input's rows are 16 bytes apart, which Hopper's copy engine demands.
    """
    if capability == (9, 0) and aligned and hopper_fits(m, n, k, block_size, dtype_bytes):
        return "hopper"
    return "triton" if m <= TRITON_TOKENS else "dequantize"


def hopper_fits(m: int, n: int, k: int, block_size: int, dtype_bytes: int) -> bool:
    """Whether the Hopper kernel can serve a product, and is the fastest way: 16-bit input, row layout, 64-blocks."""
    return (
        dtype_bytes == 2
        and block_size >= 64
        and k % block_size == 0
        and m <= (HOPPER_TOKENS if n > 2048 else TRITON_TOKENS)
    )


def linear_4bit_grad_path(m: int) -> str:
    """ "triton" or "dequantize" for the gradient's product with `m` tokens."""
    return "triton" if m <= TRITON_GRAD_TOKENS else "dequantize"
