// Activations of LLM.int8(): codes[M, K], scale rows[M] of x[M, K] (bf16 or fp16), and flags[K] of outlier columns.
//
// One block reads one row once, 16 bytes a thread and access, and keeps it in registers: magnitudes of at least the
// threshold stay out of the row's scale, get code 0, and set the flag of their column.
// The codes are those of kbit.formats.blocks.int8_codes to the bit.
//
// A row with more than `most` outliers decides that LLM.int8() multiplies all columns in 16 bits: the word behind the flags says so, and
// codes, scale and flags of such a row are left out, which nobody reads then.
//
// `limit`: bits of the least 16-bit magnitude that is an outlier; 0xffff: no outliers. As integers, magnitudes
// are in the order of the values, and NaN is above infinity: a maximum of them keeps NaN, as torch's does.
//
// Compile-time settings: FP16, VECTORS (16-byte pieces a thread holds), THREADS.

#include "hopper.h"

constexpr u32 INFINITE = FP16 ? 0x7c00 : 0x7f80;

// The lowest byte of the result is the code: adding 1.5 * 2^23 rounds to an integer, halves to even. Two roundings.
__device__ __forceinline__ u32 code_of(float value, float inverse) {
  return __float_as_uint(__fadd_rn(__fmul_rn(value, inverse), 12582912.f));
}
__device__ __forceinline__ u32 four_codes(u32 a, u32 b, float inverse) {
  const u32 low = __byte_perm(code_of(low_float(a), inverse), code_of(high_float(a), inverse), 0x0040);
  const u32 high = __byte_perm(code_of(low_float(b), inverse), code_of(high_float(b), inverse), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// Four bits, one a byte.
__device__ __forceinline__ u32 spread(u32 bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_rows(const u16* __restrict__ x, u8* __restrict__ codes, float* __restrict__ rows, u8* __restrict__ flags, int K,
              int stride_x, u32 limit, u32 most) {
  __shared__ u32 tops[THREADS / 32], counts[THREADS / 32];
  const int thread = threadIdx.x, pieces = K / 8;
  const size_t row = blockIdx.x;
  wait_for_previous_kernel();
  const uint4* const from = (const uint4*)(x + row * stride_x);
  uint4 raw[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int at = v * THREADS + thread;
    raw[v] = at < pieces ? from[at] : make_uint4(0, 0, 0, 0);
  }
  u32 top = 0;  // two maxima, of even and odd elements
  u32 marked[VECTORS], count = 0;  // a bit an outlier
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    u32 word[4] = {raw[v].x, raw[v].y, raw[v].z, raw[v].w};
    u32 largest = 0;
    marked[v] = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) largest = __vmaxu2(largest, word[j] & 0x7fff7fffu);
    if (max(largest >> 16, largest & 0xffff) >= (limit & 0xffff)) {  // few threads come here
      largest = 0;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int shift = (j & 1) * 16;
        const u32 bits = word[j >> 1] >> shift & 0x7fff;
        if (bits >= (limit & 0xffff) && bits <= INFINITE) {
          word[j >> 1] &= ~(0xffffu << shift);  // an outlier counts as zero from here on
          marked[v] |= 1u << j;
        }
      }
      count += __popc(marked[v]);
#pragma unroll
      for (int j = 0; j < 4; j++) largest = __vmaxu2(largest, word[j] & 0x7fff7fffu);
      raw[v] = make_uint4(word[0], word[1], word[2], word[3]);
    }
    top = __vmaxu2(top, largest);
  }
  top = __reduce_max_sync(~0u, max(top >> 16, top & 0xffff));
  const u32 of_warp = __reduce_add_sync(~0u, count);
  if ((thread & 31) == 0) tops[thread >> 5] = top, counts[thread >> 5] = of_warp;
  __syncthreads();
  u32 outliers = 0;
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) top = max(top, tops[w]), outliers += counts[w];
  if (outliers > most) {
    if (thread == 0 && !__ldcg((const u32*)(flags + K))) *(volatile u32*)(flags + K) = 1;
    return;
  }
  if (count) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      if (!marked[v]) continue;
      // A flag that is set is left alone: thousands of rows share a few columns, and writes to one address queue up
      // (plain stores far more than reductions in L2).
      u32* const flag = (u32*)(flags + (v * THREADS + thread) * 8);
      const uint2 before = __ldcg((const uint2*)flag);
      const u32 low = spread(marked[v]), high = spread(marked[v] >> 4);
      if (low & ~before.x) asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(flag), "r"(low) : "memory");
      if (high & ~before.y) asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(flag + 1), "r"(high) : "memory");
    }
  }
  const float absmax = low_float(top);
  if (thread == 0) rows[row] = absmax;
  uint2* const to = (uint2*)(codes + row * K);
  if (absmax < 7.888609052210118e-31f) {
    // 127 / absmax overflows for absmax below 3.7e-37; a power of two scales such a row without rounding it.
    const float boost = 18446744073709551616.f;
    const float inverse = absmax > 0.f ? __fmul_rn(__frcp_rn(__fmul_rn(absmax, boost)), 127.f) : 0.f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const u32 word[4] = {raw[v].x, raw[v].y, raw[v].z, raw[v].w};
      u32 both[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float value = __fmul_rn(j & 1 ? high_float(word[j >> 1]) : low_float(word[j >> 1]), boost);
        both[j >> 2] |= (code_of(value, inverse) & 0xff) << 8 * (j & 3);
      }
      if (v * THREADS + thread < pieces) to[v * THREADS + thread] = make_uint2(both[0], both[1]);
    }
  } else {
    const float inverse = __fmul_rn(__frcp_rn(absmax), 127.f);  // NaN stays NaN: the row's products are NaN anyway
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const u32 low = four_codes(raw[v].x, raw[v].y, inverse), high = four_codes(raw[v].z, raw[v].w, inverse);
      if (v * THREADS + thread < pieces) to[v * THREADS + thread] = make_uint2(low, high);
    }
  }
}
