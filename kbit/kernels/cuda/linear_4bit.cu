// out[M, N] = x[M, K] W[N, K]^T + bias on Hopper, W in NF4 or FP4 (row layout, blocks of 64 and up), x in bf16 or fp16.
//
// The product is computed as W x^T: wgmma takes its left operand from registers, so decoded weights never touch shared
// memory, and a lane decodes exactly the elements its fragment needs. One byte holds two weights that are neighbours in
// K, which is one 32-bit fragment register: a table of all 256 pairs turns a byte into a register with one shared-memory
// load. Every lane owns a copy of the table in its own bank (entry e of lane l is word 64 e + l), so no access conflicts.
//
// A producer warp keeps STAGES tiles of codes and inputs in flight with the bulk tensor copy engine; WR x WK consumer
// warpgroups (WR along N, RW rows each; WK take turns along K) decode block i + 1 while the tensor cores work on block i. CLUSTER
// thread blocks may split K; parts meet in distributed shared memory, in a fixed order: results repeat bit for bit.
//
// GROUPED: W holds several experts, [E, N, K], and x's rows are sorted by expert. blockIdx.y counts tiles of NT rows through
// all experts; `offsets` says where each expert's rows end, and rows after the last of them are nobody's: they become 0.
//
// WEIGHTS > 1: several weights of one K and one format multiply the same x. A row of tiles goes through all of them; each
// has its own bias and output.
//
// Compile-time settings: FP16, GROUPED, WEIGHTS, NT (tokens a tile), RW (rows a warpgroup: 64, or fewer where tiles then share out more
// evenly; tensor cores compute 64 all the same), WR, WK, KS (K a stage: 64, 128 or 256), STAGES, CLUSTER, CTAS (blocks a
// multiprocessor), NESTED (double-quantized scales; then DYNAMIC_MAP, their 256 levels), ACC_SCALE (scales multiply the accumulator in fp32; else the weights
// in 16 bits, for many tokens), REGISTERS (what a consumer thread takes over from the producer; 0: none), and CODEBOOK, the 16 values in 16 bits. wgmma.h is generated for NT.

#include "hopper.h"
#include "epilogue.h"
#include "weights.h"
#include "wgmma.h"

constexpr int ROWS = RW * WR;                      // rows of W a tile
constexpr int GROUPS = WR * WK;                    // consumer warpgroups
constexpr int THREADS = 128 * GROUPS + (REGISTERS ? 128 : 32);
constexpr int RB = KS / 2;                         // bytes of codes a row and stage
constexpr int NB = KS / 64;                        // 64-blocks a stage
constexpr int W_BYTES = ROWS * RB;
constexpr int X_BYTES = NT * 128;                  // one 64-wide slice of x
constexpr int X_STAGE = X_BYTES * (KS / 64);
constexpr int LUT_OFFSET = STAGES * (W_BYTES + X_STAGE);
constexpr int MAP_OFFSET = LUT_OFFSET + 65536;
constexpr int BAR_OFFSET = MAP_OFFSET + 1024;
constexpr int PITCH = ROWS + 4;                    // floats a token in the epilogue's buffer
constexpr int ACC = NT / 2;                        // accumulators a lane
constexpr int VALUES = NB == 4 ? 2 : 1;            // scales a lane fetches a stage

static_assert((NB == 1 && WK == 1) || NB == 2 || NB == 4, "stages of one block alternate between two sets of registers");
static_assert(RW % 8 == 0 && RW > 32 && RW <= 64 && STAGES * W_BYTES % 1024 == 0, "tiles of x start where their swizzle does");
static_assert(STAGES % WK == 0 && STAGES >= 2 * WK, "a stage belongs to one warpgroup along K, which holds one while it waits for another");

template <int V> struct Int { static constexpr int value = V; };

__device__ __forceinline__ void prefetch_tile(const TensorMap* map, int x, int y) {  // into L2 only
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}
// The pair of one byte of a word. `select` moves that byte to bits 8-15 above the lane's own 4 * lane, which is the
// address within the table: its entries are 256 bytes apart for this one instruction's sake.
__device__ __forceinline__ u32 byte_pair(u32 word, u32 lane4, u32 select, u32 table) {
  u32 at, pair;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(at) : "r"(word), "r"(lane4), "r"(select));
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at + table));
  return pair;
}
__device__ __forceinline__ u32 doubled(float v) { u32 h = to_half(v); return h | h << 16; }

__constant__ u16 codebook[16] = {CODEBOOK};
#if NESTED
__device__ const float dynamic_map[256] = {DYNAMIC_MAP};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
#if CLUSTER > 1
    __cluster_dims__(1, 1, CLUSTER)
#endif
#include "linear_4bit_parameters.h"
  extern __shared__ u8 raw_shared[];
  const u32 base = (shared_address(raw_shared) + 1023) & ~1023u;
  const u32 x_base = base + STAGES * W_BYTES;
  const u32 full = base + BAR_OFFSET, empty = full + 8 * STAGES;
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread >> 5, 0), lane = thread & 31;
  int token0 = blockIdx.y * NT, weight_row0 = row0;  // of all experts' rows
  const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;

  // This block's stages. With one block a stage the loop below needs an even number of them; the copy engine fills what
  // lies beyond K with zeros.
  constexpr int EVEN = NB == 1 ? 2 : 1;
  const int all = ((K + KS - 1) / KS + EVEN - 1) / EVEN * EVEN;
  const int share = ((all + CLUSTER - 1) / CLUSTER + EVEN - 1) / EVEN * EVEN;
  const int begin = min(all, (int)rank * share);
  int steps = min(share, all - begin);

  auto fetch = [&](int step, int slot) {
    const int k = (begin + step) * KS;
    const u32 bar = full + 8 * slot;
    barrier_expect(bar, W_BYTES + X_STAGE);
    copy_tile(base + slot * W_BYTES, &map_w, k / 2, weight_row0, bar);
#pragma unroll
    for (int c = 0; c < KS / 64; c++) copy_tile(x_base + slot * X_STAGE + c * X_BYTES, &map_x, k + 64 * c, token0, bar);
  };
  if (thread == 128 * GROUPS) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * WR);
    }
    barriers_are_ready();
    // A read into L2 is harmless even where the kernel before this one still writes these codes.
    for (int step = 0; !GROUPED && step < STAGES && step < steps; step++) prefetch_tile(&map_w, (begin + step) * KS / 2, row0);
  }
  if (thread < 128 * GROUPS) {
    for (int i = thread; i < 2048; i += 128 * GROUPS) {  // 16 bytes each: a quarter of an entry's row of 32 copies
      const u32 pair = (u32)codebook[i >> 7] | (u32)codebook[(i >> 3) & 15] << 16;  // the even element is the high nibble
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(base + LUT_OFFSET + (i >> 3) * 256 + (i & 7) * 16), "r"(pair) : "memory");
    }
#if NESTED
    for (int i = thread; i < 256; i += 128 * GROUPS)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(base + MAP_OFFSET + i * 4), "f"(dynamic_map[i]) : "memory");
#endif
  }
  // Up to here nothing was read that an earlier kernel may have written, and that one may still run.
  wait_for_previous_kernel();
#if GROUPED
  int expert = -1;  // whose tile this is; `experts`: nobody's
  for (int e0 = 0, before = 0; e0 <= experts && expert < 0; e0 += 32) {
    const int e = e0 + lane;
    const int from = e > 0 && e <= experts ? offsets[e - 1] : 0, to = e < experts ? offsets[e] : M;
    const int tiles = e <= experts ? (to - from + NT - 1) / NT : 0;
    int last = tiles;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, last, d);
      if (lane >= d) last += other;
    }
    const u32 found = __ballot_sync(~0u, (int)blockIdx.y < before + last);
    if (found) {
      const int at = __ffs(found) - 1;
      expert = e0 + at;
      token0 = __shfl_sync(~0u, from, at) + ((int)blockIdx.y - before - __shfl_sync(~0u, last - tiles, at)) * NT;
      M = __shfl_sync(~0u, to, at);
    }
    before += __shfl_sync(~0u, last, 31);
  }
  if (expert < 0) return;
  weight_row0 += expert * N;
  bias = expert < experts && bias ? bias + (size_t)expert * N : nullptr;
  if (expert == experts) steps = 0;
#endif
  if (thread == 128 * GROUPS)
    for (int step = 0; step < STAGES && step < steps; step++) fetch(step, step);
  __syncthreads();

  const int group = warp >> 2, g = lane >> 2, t = lane & 3;
  const int group_k = group % WK, group_r = group / WK;
  const int local0 = group_r * RW + (warp & 3) * 16 + g;  // this lane's rows: local0 and local0 + 8
  const bool has_top = RW == 64 || (warp & 3) * 16 < RW, has_low = RW == 64 || (warp & 3) * 16 + 8 < RW;

  if (warp >= 4 * GROUPS) {
#if REGISTERS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
#endif
    if (thread == 128 * GROUPS)
      for (int step = STAGES, slot = 0, phase = 0; step < steps; step++) {
        barrier_wait(empty + 8 * slot, phase);
        fetch(step, slot);
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
  } else {
#if REGISTERS
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
    float acc[ACC];
#pragma unroll
    for (int i = 0; i < ACC; i++) acc[i] = 0.f;
    const u32 table = base + LUT_OFFSET, lane4 = lane * 4, select = 0x5504u | t << 4;
    const int my_row = VALUES == 2 ? 0 : NB == 2 ? t >> 1 : t & 1;  // which of the rows, which block a lane fetches scales of
    const int my_block = NB == 4 ? t : NB == 2 ? t & 1 : 0;
    const float shift = NESTED ? *offset : 0.f;
    const u8* const scale_codes = (const u8*)absmax;
    const float* const scales = (const float*)absmax;

    float raw[VALUES], factor[VALUES];  // prefetched: scale or its nested absmax; code of the scale
    u32 code[VALUES], first[VALUES];
    int last_k[VALUES];  // where the scales of a row end; 0 beyond the last row
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
      const int row = row0 + local0 + 8 * (my_row + v);
      first[v] = (u32)(row + weight_row0 - row0) * (u32)(K >> block_shift);
      last_k[v] = row < N && (my_row + v ? has_low : has_top) ? min(K, (begin + steps) * KS) : 0;
    }
    auto fetch_scales = [&](int step) {
      const int k = (begin + step) * KS + my_block * 64;
#pragma unroll
      for (int v = 0; v < VALUES; v++) {
        const u32 index = first[v] + ((u32)k >> block_shift);
        raw[v] = 0.f;
        code[v] = 0;
        if (k < last_k[v]) {
          if (NESTED) {
            code[v] = scale_codes[index];
            raw[v] = nested_absmax[index >> 8];
          } else {
            raw[v] = scales[index];
          }
        }
      }
    };
    auto decode_scales = [&]() {
#pragma unroll
      for (int v = 0; v < VALUES; v++) {
        factor[v] = raw[v];
        if (NESTED) {
          float level;
          asm volatile("ld.shared.f32 %0, [%1];" : "=f"(level) : "r"(base + MAP_OFFSET + code[v] * 4));
          // Beyond the last row and column this is the offset: finite, and multiplied by inputs of 0 or never stored.
          factor[v] = __fadd_rn(__fmul_rn(level, raw[v]), shift);
        }
      }
    };

    u32 a[2][16];
#pragma unroll
    for (int i = 0; RW < 64 && i < 16; i++) a[0][i] = a[1][i] = 0;
    float part[ACC_SCALE ? ACC : 1], s0[2], s1[2];
#pragma unroll
    for (int i = 0; i < (ACC_SCALE ? ACC : 1); i++) part[i] = 0.f;

    // Codes of 64 rows x 64 columns -> fragments of this parity.
    auto decode = [&](auto parity, auto which, int slot) {
      constexpr int P = decltype(parity)::value, B = decltype(which)::value;
      const int quad = lane & ~3;
      s0[P] = __shfl_sync(~0u, factor[0], quad | B);
      s1[P] = VALUES == 2 ? __shfl_sync(~0u, factor[VALUES - 1], quad | B)
                          : __shfl_sync(~0u, factor[0], quad | (NB == 2 ? 2 | B : 1));
      const int chunk = 2 * B;
      const u32 swizzle = ((u32)local0 * RB >> 7) & (RB / 16 - 1);  // the same for both rows
      const u32 row = base + slot * W_BYTES + local0 * RB;
      const u32 at0 = (chunk ^ swizzle) * 16, at1 = ((chunk + 1) ^ swizzle) * 16;
      // Rows that are another warpgroup's keep what they hold: nobody stores their sums.
      if (has_low) {
        const uint4 q0 = load_shared16(row + at0), q1 = load_shared16(row + at1);
        const uint4 q2 = load_shared16(row + 8 * RB + at0), q3 = load_shared16(row + 8 * RB + at1);
        const u32 top[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
        const u32 low[8] = {q2.x, q2.y, q2.z, q2.w, q3.x, q3.y, q3.z, q3.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
          a[P][2 * i] = byte_pair(top[i], lane4, select, table);
          a[P][2 * i + 1] = byte_pair(low[i], lane4, select, table);
        }
      } else if (has_top) {
        const uint4 q0 = load_shared16(row + at0), q1 = load_shared16(row + at1);
        const u32 top[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#pragma unroll
        for (int i = 0; i < 8; i++) a[P][2 * i] = byte_pair(top[i], lane4, select, table);
      }
      if (!ACC_SCALE) {
        const u32 h0 = doubled(s0[P]), h1 = doubled(s1[P]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          a[P][2 * i] = times(a[P][2 * i], h0);
          a[P][2 * i + 1] = times(a[P][2 * i + 1], h1);
        }
      }
    };
    auto multiply = [&](auto parity, auto which, int slot) {
      constexpr int P = decltype(parity)::value, B = decltype(which)::value;
      // 128-byte swizzled K-major x: 8 tokens are 1024 bytes; 16 elements further in K are 32 bytes further.
      const u32 x = x_base + slot * X_STAGE + B * X_BYTES;
      const u64 descriptor = (u64)((x & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < 4; i++) {
#if ACC_SCALE
        wgmma(part, a[P] + 4 * i, descriptor + 2 * i, i > 0);
#else
        wgmma(acc, a[P] + 4 * i, descriptor + 2 * i, 1);
#endif
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    };
    auto finish = [&](auto parity) {  // the product has left the tensor cores
      constexpr int P = decltype(parity)::value;
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#if ACC_SCALE
#pragma unroll
      for (int i = 0; i < ACC; i++) asm volatile("" : "+f"(part[i])::"memory");
#pragma unroll
      for (int i = 0; i < ACC; i++) acc[i] = fmaf(part[i], i & 2 ? s1[P] : s0[P], acc[i]);
#else
#pragma unroll
      for (int i = 0; i < ACC; i++) asm volatile("" : "+f"(acc[i])::"memory");
#endif
    };
    int slot = group_k;
    u32 phase = 0;
    auto enter = [&](int step) {  // scales of a stage decoded, those of the next one asked for, its codes and inputs there
      decode_scales();
      fetch_scales(step + WK);
      barrier_wait(full + 8 * slot, phase);
    };
    // While the tensor cores multiply one block, the next one is decoded.
    auto last_of_stage = [&](auto parity, int step, bool more) {
      constexpr int P = decltype(parity)::value;
      const int done = slot;
      multiply(Int<P>(), Int<NB - 1>(), done);
      if (more) {
        slot += WK;
        if (slot >= STAGES) slot -= STAGES, phase ^= 1;
        enter(step + WK);
        decode(Int<1 - P>(), Int<0>(), slot);
      }
      finish(Int<P>());
      if (lane == 0) barrier_arrive(empty + 8 * done);
    };
    if (group_k < steps) {
      fetch_scales(group_k);
      enter(group_k);
      decode(Int<0>(), Int<0>(), slot);
    }
    if constexpr (NB == 1) {
      for (int step = 0; step < steps; step += 2) {
        last_of_stage(Int<0>(), step, true);
        last_of_stage(Int<1>(), step + 1, step + 2 < steps);
      }
    } else {
      for (int step = group_k; step < steps; step += WK) {
        multiply(Int<0>(), Int<0>(), slot);
        decode(Int<1>(), Int<1>(), slot);
        finish(Int<0>());
        if constexpr (NB == 4) {
          multiply(Int<1>(), Int<1>(), slot);
          decode(Int<0>(), Int<2>(), slot);
          finish(Int<1>());
          multiply(Int<0>(), Int<2>(), slot);
          decode(Int<1>(), Int<3>(), slot);
          finish(Int<0>());
        }
        last_of_stage(Int<1>(), step, step + WK < steps);
      }
    }

    // Parts meet in shared memory, [WK][NT][PITCH] floats over the stages, once no consumer needs those.
    asm volatile("bar.sync 1, %0;" ::"n"(128 * GROUPS) : "memory");
#pragma unroll
    for (int i = 0; i < ACC; i++) {
      const int token = (i >> 2) * 8 + 2 * t + (i & 1), row = local0 + (i & 2) * 4;
      if (i & 2 ? has_low : has_top)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(base + ((group_k * NT + token) * PITCH + row) * 4), "f"(acc[i]) : "memory");
    }
  }
  store_sums<NT, ROWS, PITCH, WK, THREADS, CLUSTER>(base, rank, thread, token0, row0, M, N, out, [&](float v, int n) { return v + (bias && n < N ? from_half(bias[n]) : 0.f); });
}
