// NF4 and FP4 quantization of whole blocks of 32 to 256 values, to the bit as the reference.
//
// The code of a value is the number of midpoints strictly below it. Cutting [-1, 1] into intervals (lo, hi] of width 1/16 leaves at most
// one midpoint inside each: a table holds, for every interval, its midpoint and the codes on both sides. One multiply-add that
// rounds up leaves the interval's number in the low bits of a float. Every lane owns a copy of the table, so that look-ups never conflict.
//
// Compile-time settings: KIND (0 fp32, 1 fp16, 2 bf16), LANES (threads a block of values: block size / 8), TINY, MIDPOINTS (33 floats) and
// CODES (33 integers: the code up to the midpoint in bits 0-3, above it in bits 4-7).

#define FP16 (KIND == 1)
#include "hopper.h"

constexpr int THREADS = 256, BINS = 33, WIDTH = 35;  // one more at either end: rounding may carry a value just past 1
constexpr int ROUNDS = 8;                            // 8 values a thread and round

__constant__ u32 midpoints[BINS] = {MIDPOINTS};  // as bits
__constant__ u32 codes[BINS] = {CODES};

__device__ __forceinline__ uint4 load(const uint4* p) {  // read once: it need not stay in the first cache
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_4bit(const uint4* __restrict__ x, u32* __restrict__ packed, float* __restrict__ absmax, long long octets) {
  __shared__ float2 table[WIDTH * 32];
  for (int i = threadIdx.x; i < WIDTH * 32; i += THREADS) {
    const int bin = min(max((i >> 5) - 1, 0), BINS - 1);
    table[i] = make_float2(__uint_as_float(midpoints[bin]), __uint_as_float(codes[bin]));
  }
  wait_for_previous_kernel();
  __syncthreads();
  const int lane = threadIdx.x & 31;
  const u32 mine = (u32)__cvta_generic_to_shared(table) + lane * 8;
  const long long first = (long long)blockIdx.x * (THREADS * ROUNDS) + threadIdx.x;
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    constexpr int LOADS = ROUNDS / 2;
    uint4 raw[LOADS][KIND ? 1 : 2];
#pragma unroll
    for (int r = 0; r < LOADS; r++) {
      const long long octet = first + (half * LOADS + r) * THREADS;
#pragma unroll
      for (int i = 0; i < (KIND ? 1 : 2); i++)
        raw[r][i] = octet < octets ? load(x + octet * (KIND ? 1 : 2) + i) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int r = 0; r < LOADS; r++) {
      const long long octet = first + (half * LOADS + r) * THREADS;
      float v[8];
      const u32 word[4] = {raw[r][0].x, raw[r][0].y, raw[r][0].z, raw[r][0].w};
#if KIND
#pragma unroll
      for (int i = 0; i < 4; i++) v[2 * i] = low_float(word[i]), v[2 * i + 1] = high_float(word[i]);
#else
      const u32 more[4] = {raw[r][KIND ? 0 : 1].x, raw[r][KIND ? 0 : 1].y, raw[r][KIND ? 0 : 1].z, raw[r][KIND ? 0 : 1].w};
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = __uint_as_float(word[i]), v[4 + i] = __uint_as_float(more[i]);
#endif
      float scale = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++) scale = fmaxf(scale, fabsf(v[i]));
#pragma unroll
      for (int d = 1; d < LANES; d *= 2) scale = fmaxf(scale, __shfl_xor_sync(~0u, scale, d));
      const float factor = __frcp_rn(fmaxf(scale, TINY));
      u32 result = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float s = __fmul_rn(v[i], factor);
        // 12582912 is 1.5 * 2^23: the sum's last bit is worth 1, and the interval's number is in its low bits.
        const u32 bin = __float_as_uint(__fmaf_ru(s, 16.f, 12582912.f));
        float2 entry;
        asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(entry.x), "=f"(entry.y) : "r"(bin * 256u + (mine + (17u - 0x4b400000u) * 256u)));
        const u32 pair = __float_as_uint(entry.y);
        const u32 code = s > entry.x ? pair >> 4 : pair;
        result |= (code & 15) << (i & 1 ? (i >> 1) * 8 : (i >> 1) * 8 + 4);  // the even element is the high nibble
      }
      if (octet < octets) {
        asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(packed + octet), "r"(result) : "memory");
        if ((lane & (LANES - 1)) == 0) absmax[octet / LANES] = scale;
      }
    }
  }
}
