// 8-bit states of the optimizer step: codes to values and back, through tables in shared memory.
//
// Decoding: the 256 values lie 32-fold in shared memory, one copy a bank, so that a warp reads any 32 codes without
// conflict. Byte 1 of the address is the code, byte 0 the lane: one byte permutation makes it.
// Encoding: the upper 16 bits of |x| / absmax * SCALE name a cell of floats that holds at most one midpoint between two codes.
// The table has, for each cell, a number that turns the float's bits into the code by one addition: (code below the
// midpoint) << 16, plus what makes the low 16 bits carry where they exceed the midpoint's, less the cell itself.
// A positive second moment, however small, has the smallest positive code at least (kbit/optim/state.py). So an unsigned
// value has SMALLEST added, which is where cells begin, rounded up: 0 alone stays in its place, and whatever exceeds it
// carries into code 1. The table's midpoints have it added too.
//
// Settings (macros): BITS8, SCALE, CELLS, SIGNED_TOP, see optim.cu.

#define SMALLEST 1.17549435e-38f

struct Tables {
  float values[BITS8 ? 256 : 1][2][32];  // [code][signed, unsigned][lane]
  u32 cells[2][CELLS];
};

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// The value of a code under its lane's copy of the table; lane_at: lane * 4.
template <bool SIGNED>
__device__ __forceinline__ float decode(const Tables& tables, u32 word, int byte, u32 lane_at) {
  u32 at = permute(word, lane_at, 0x6604u | byte << 4);
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(tables.values) + (SIGNED ? 0 : 128) + at);
}

// The sum whose byte 2 is the code of x (of |x|, plus 127, where SIGNED). inverse: SCALE / absmax. Scaled so, a signed
// value below the first cell is subnormal and becomes 0, without a comparison; so does an unsigned one that is subnormal
// itself. Values exactly between two codes go inward.
template <bool SIGNED>
__device__ __forceinline__ u32 encode(const Tables& tables, float x, float inverse) {
  float a;
  if constexpr (SIGNED) {
    asm("mul.ftz.f32 %0, %1, %2;" : "=f"(a) : "f"(x), "f"(inverse));
    a = fabsf(fmaxf(a, -SIGNED_TOP));  // there is no code for -1
  } else {
    asm("fma.rp.ftz.f32 %0, %1, %2, %3;" : "=f"(a) : "f"(x), "f"(inverse), "f"(SMALLEST));
  }
  u32 bits = __float_as_uint(a);
  return tables.cells[SIGNED ? 0 : 1][bits >> 16] + bits;
}

// Codes of four elements from their sums and their signs.
template <bool SIGNED>
__device__ __forceinline__ u32 pack_codes(const u32* sums, const float* x) {
  u32 codes = permute(permute(sums[0], sums[1], 0x62), permute(sums[2], sums[3], 0x62), 0x5410);
  if (!SIGNED) return codes;
  u32 first = permute(__float_as_uint(x[0]), __float_as_uint(x[1]), 0xfb);
  u32 second = permute(__float_as_uint(x[2]), __float_as_uint(x[3]), 0xfb);
  u32 negative = permute(first, second, 0x5410);  // 0xff where the sign is set: 254 - code there
  return (codes ^ negative) - (negative & 0x01010101u);
}

template <bool SIGNED>
__device__ __forceinline__ void encode_block(const Tables& tables, const float* x, float inverse, u32* words) {
#pragma unroll
  for (int k = 0; k < EACH / 4; k++) {
    u32 sums[4];
#pragma unroll
    for (int e = 0; e < 4; e++) sums[e] = encode<SIGNED>(tables, x[k * 4 + e], inverse);
    words[k] = pack_codes<SIGNED>(sums, x + k * 4);
  }
}

// SCALE / absmax, rounded to nearest but for the rarest cases; 0 for 0.
__device__ __forceinline__ float inverse_of(u32 absmax) {
  float x = __uint_as_float(absmax), y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  y = fmaf(y, fmaf(-x, y, 1.0f), y);
  return absmax ? y * SCALE : 0.0f;
}
