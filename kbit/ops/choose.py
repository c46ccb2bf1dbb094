"""Which kernel serves a product: pure functions of device, shape and format, testable without that device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Up to this many tokens a product reads the int8 weights alone: the activations stay unquantized, which is both
# faster (memory bound) and more accurate. Above it, LLM.int8() multiplies in int8.
WEIGHT_ONLY_TOKENS = 8
# The same on a GPU, where a pass over the activations costs more than their 16 bits do (measured on one H200).
GPU_WEIGHT_ONLY_TOKENS = 64

# Up to this many tokens Triton decodes the 4-bit weight inside the product. Above it the tensor cores set the time, and
# decoding once, then multiplying with the vendor's library, is faster.
TRITON_TOKENS = 64
TRITON_GRAD_TOKENS = 16
# Above 128 tokens another Hopper kernel shares tiles of 256 features by up to 256 tokens out to pairs of processors.
# It is the fastest from 48 tiles on, from 32 where the first kernel's tiles of 256 tokens would be partly empty, and
# where a sum is long enough to be cut; up to 4096 tokens (measured on one H200). Elsewhere the first kernel serves up
# to HOPPER_TOKENS, where N is large enough; then the weight is decoded first.
HOPPER_WIDE_TOKENS = range(129, 4097)
HOPPER_WIDE_TILES, HOPPER_WIDE_TILES_PADDED, HOPPER_WIDE_SUM = 48, 32, 8192
HOPPER_TOKENS = 768
# The same for the gradient's product, for large weights and for those below 2^25 elements (measured on one H200).
HOPPER_GRAD_TOKENS, HOPPER_GRAD_TOKENS_SMALL = 256, 128
# Above this many tokens, where weight-only was asked for, decoding the int8 weight once is no slower.
INT8_DEQUANTIZE_TOKENS = 128
INT8_GRAD_TOKENS = 64
# Where weight-only was asked for and another Hopper kernel is the fastest: the one that 4-bit weights have for many
# tokens; for weights of at least so many elements, up to INT8_DEQUANTIZE_TOKENS and beyond (measured on one H200).
HOPPER_INT8_WIDE_TOKENS = range(65, 4097)
HOPPER_INT8_WIDE_SIZE, HOPPER_INT8_WIDE_SIZE_BEYOND = 2**25, 2**24
# Columns that the Hopper kernel of LLM.int8() has room to mark.
HOPPER_INT8_K = 32768


def cpu_fused_int8_tokens(vnni: bool) -> int:
    """Up to how many tokens a CPU multiplies with the codes where weight-only was asked for; beyond, decoding the
    weight once is faster. vnni: it has AVX512's integer products; two or three a token beat one in bf16 or fp32."""
    return 1 << 30 if vnni else 16


def linear_8bit_path(device: str, m: int, int8_activations: bool | None = None) -> str:
    """ "weight_only" or "llm_int8" for `m` tokens on a device type; int8_activations asks for the one or the other."""
    if int8_activations is not None:
        return "llm_int8" if int8_activations else "weight_only"
    return "weight_only" if m <= (WEIGHT_ONLY_TOKENS if device == "cpu" else GPU_WEIGHT_ONLY_TOKENS) else "llm_int8"


def llm_int8_outliers(device: str, m: int, k: int) -> int:
    """Of `k` columns, how many outlier columns LLM.int8() of `m` tokens takes before it has all in 16 bits, which then
    is both faster and more accurate. A GPU that multiplies few tokens does not hide that such columns are read a
    row's length apart (measured on one H200 and on one AMD EPYC)."""
    if device == "cpu":
        return max(64, k // 8)
    return 64 if m < 512 else 256


def linear_8bit_kernel(
    path: str, m: int, n: int, k: int, dtype_bytes: int, capability: tuple[int, int] | None, aligned: bool = True
) -> str:
    """Which kernel of a GPU takes a path of `linear_8bit_path`: "hopper", "hopper_wide", "triton", or "dequantize"
    (decode the weight once, then the vendor's library). capability, aligned: as in `linear_4bit_path`."""
    fits = dtype_bytes == 2 and k % 16 == 0 and k <= HOPPER_INT8_K and n > 0
    on_hopper = capability == (9, 0) and aligned and fits
    if path == "weight_only":
        beyond = m > INT8_DEQUANTIZE_TOKENS
        least = HOPPER_INT8_WIDE_SIZE_BEYOND if beyond else HOPPER_INT8_WIDE_SIZE
        if on_hopper and m in HOPPER_INT8_WIDE_TOKENS and n * k >= least:
            return "hopper_wide"
        if beyond:
            return "dequantize"
    return "hopper" if on_hopper else "triton"


def linear_8bit_grad_path(m: int) -> str:
    """ "triton" or "dequantize" for the gradient of an int8 product to its `m` tokens."""
    return "triton" if m <= INT8_GRAD_TOKENS else "dequantize"


def linear_4bit_path(
    m: int, n: int, k: int, block_size: int, dtype_bytes: int, capability: tuple[int, int] | None, aligned: bool = True
) -> str:
    """How a GPU multiplies `m` tokens with a 4-bit `W [N, K]`: "hopper", "hopper_wide", "triton" or "dequantize".

    capability: of an NVIDIA GPU on which CUDA C++ can be compiled, else None. aligned: codes and input start on 16-byte
    boundaries and the input's rows are 16 bytes apart, which Hopper's copy engine demands.
    """
    reads = dtype_bytes == 2 and block_size >= 64 and k % block_size == 0  # 16-bit input, row layout, 64-blocks
    if capability == (9, 0) and aligned and reads:
        if hopper_wide(m, n, k):
            return "hopper_wide"
        if m <= (HOPPER_TOKENS if n > 2048 else TRITON_TOKENS):
            return "hopper"
    return "triton" if m <= TRITON_TOKENS else "dequantize"


def hopper_wide(m: int, n: int, k: int) -> bool:
    """Whether the Hopper kernel for many tokens is the faster one."""
    tiles, padded = -(-n // 256) * -(-m // 256), -m % 256 >= 32
    long_sum = m <= 256 and n > 2048 and k >= HOPPER_WIDE_SUM
    enough = tiles >= (HOPPER_WIDE_TILES_PADDED if padded else HOPPER_WIDE_TILES)
    return m in HOPPER_WIDE_TOKENS and (enough or long_sum)


# Products that share their input are one launch on Hopper: up to so many tokens and weights. With more tokens each
# product fills the GPU by itself.
GROUP_TOKENS = 64
GROUP_WEIGHTS = 4


def linear_4bit_group_path(
    m: int,
    n: Sequence[int],
    k: int,
    block_size: int,
    dtype_bytes: int,
    capability: tuple[int, int] | None,
    aligned: bool,
) -> str:
    """ "hopper" (one launch) or "separate" for products of `m` tokens with several 4-bit weights `[n[i], K]`.

    The other arguments as in `linear_4bit_path`, aligned: all of them are."""
    if not _group_fits(m, n):
        return "separate"
    paths = {linear_4bit_path(m, rows, k, block_size, dtype_bytes, capability, aligned) for rows in n}
    return "hopper" if paths == {"hopper"} else "separate"


def linear_8bit_group_path(
    path: str,
    m: int,
    n: Sequence[int],
    k: int,
    dtype_bytes: int,
    capability: tuple[int, int] | None,
    aligned: bool = True,
) -> str:
    """The same for int8 weights, by a path of `linear_8bit_path`: only one that leaves the activations as they are."""
    if path != "weight_only" or not _group_fits(m, n):
        return "separate"
    kernels = {linear_8bit_kernel(path, m, rows, k, dtype_bytes, capability, aligned) for rows in n}
    return "hopper" if kernels == {"hopper"} else "separate"


def _group_fits(m: int, n: Sequence[int]) -> bool:
    return 0 < m <= GROUP_TOKENS and 1 < len(n) <= GROUP_WEIGHTS and min(n) > 0


def linear_4bit_grad_path(
    m: int, n: int, k: int, block_size: int, dtype_bytes: int, capability: tuple[int, int] | None, aligned: bool = True
) -> str:
    """How a GPU multiplies the gradient of `m` tokens with `W [N, K]`: "triton", "hopper" or "dequantize"."""
    if m <= TRITON_GRAD_TOKENS:
        # Triton's tiles take 3.8 ms for 14336 x 4096 on an H200, decoding first 75 us; other GPUs have not been timed.
        return "dequantize" if capability == (9, 0) else "triton"
    reads = dtype_bytes == 2 and block_size >= 64 and k % block_size == 0 and n % 8 == 0
    most = HOPPER_GRAD_TOKENS if n * k >= 2**25 else HOPPER_GRAD_TOKENS_SMALL
    if capability == (9, 0) and aligned and reads and m <= most and k > 2048:
        return "hopper"
    return "dequantize"


# Up to this many tokens the CPU's own kernel decodes the 4-bit weight in the product; on AVX512 at every size. Above it
# decoding slices and multiplying with torch's library is faster: only for AVX512 the kernel packs its operands too.
# Measured on two cores of an AMD EPYC (Zen 4); with AMX tiles torch's bf16 product takes over early. torch has no fast
# fp16 product on a CPU.
CPU_FUSED_TOKENS = {torch.bfloat16: 160, torch.float32: 160, torch.float16: 1 << 30}
CPU_AMX_FUSED_TOKENS = 12
# Bytes of a slice of W that torch multiplies with while the L2 cache holds it.
CPU_SLICE_BYTES = 1 << 20


def linear_4bit_cpu_path(m: int, k: int, block_size: int, dtype: torch.dtype, amx: bool, avx512: bool) -> str:
    """ "fused" (decoded inside the product) or "sliced" (decoded a slice at a time, then torch) for `m` tokens.
    amx: torch's bf16 products run on tiles; avx512: kbit's kernels are those for AVX512."""
    if k % block_size or block_size < 32 or block_size & (block_size - 1):
        return "sliced"
    if amx and dtype == torch.bfloat16:
        return "fused" if m <= CPU_AMX_FUSED_TOKENS else "sliced"
    return "fused" if avx512 or m <= CPU_FUSED_TOKENS[dtype] else "sliced"


def cpu_slice_rows(m: int, dtype: torch.dtype) -> int:
    """Rows of W in a slice: torch's product packs x anew for each, so that many tokens want few slices."""
    return 1024 if m >= (512 if dtype == torch.float32 else 256) else 256


def cpu_slice_columns(n: int, block_size: int, dtype: torch.dtype) -> int:
    """Columns of W [N, K] in a slice for the gradient: whole blocks, and bytes that a cache holds."""
    return max(1, CPU_SLICE_BYTES // (n * dtype.itemsize * 256)) * max(256, block_size)


# Rows an expert, on average, up to which its weight is decoded inside the product; above, decoding all experts once and
# the vendor's grouped product is faster. The Hopper kernel keeps up for longer.
EXPERT_ROWS = 64
HOPPER_EXPERT_ROWS = 256
EXPERT_GRAD_ROWS = 16


def experts_4bit_path(
    rows: int,
    experts: int,
    n: int,
    k: int,
    block_size: int,
    dtype_bytes: int,
    capability: tuple[int, int] | None,
    grouped: bool,
    aligned: bool = True,
) -> str:
    """How a GPU multiplies `rows` sorted by expert with `W [E, N, K]`: "hopper", "triton" or "grouped_mm" (decode, then
    torch's grouped product, where `grouped` says that it can). The other arguments as in `linear_4bit_path`."""
    share = -(-rows // max(experts, 1))
    reads = dtype_bytes == 2 and block_size >= 64 and k % block_size == 0
    if capability == (9, 0) and aligned and reads and share <= HOPPER_EXPERT_ROWS:
        return "hopper"
    return "grouped_mm" if grouped and share > EXPERT_ROWS else "triton"


def experts_path(rows: int, experts: int, grouped: bool, limit: int) -> str:
    """ "triton" or "grouped_mm" for the other products over experts: up to `limit` rows an expert the former."""
    return "grouped_mm" if grouped and rows > limit * experts else "triton"
