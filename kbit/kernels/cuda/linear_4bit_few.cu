// out[M, N] = x[M, K] W[N, K]^T + bias on Hopper for few tokens, W in NF4 or FP4 (row layout, blocks of 64, double-quantized
// scales, K a multiple of 1024), x in bf16 or fp16.
//
// At few tokens the product waits for shared memory, so this kernel reads as little of it as it can. The order of a sum over K is
// free: a lane takes k 8t to 8t + 7 of every 32 (t: its place in a quad), whose codes are the four bytes that ldmatrix hands it and
// whose inputs are 16 bytes of x as they lie there. No lane reads what another one reads; wgmma would want x, or the codes, permuted.
// A table of all 256 pairs turns a byte into a fragment register with one load; every lane owns a copy in its own bank.
//
// A producer warp keeps STAGES tiles of codes and inputs in flight with the bulk tensor copy engine. WR x WK consumer warps: WR along N
// with R tiles of 16 rows each, WK along K, whose sums meet in shared memory at the end. CLUSTER thread blocks may split K; parts meet
// in distributed shared memory, in a fixed order: results repeat bit for bit.
//
// The scales of this block's part of W, one byte for 64 weights, are copied to shared memory first, SCALES (an odd number, so that 8
// rows lie in different banks) times 16 bytes a row: read from global memory, a byte of a line at a time, they kept the load unit busy.
//
// WEIGHTS > 1: several weights of one K and one format multiply the same x. A row of tiles goes through all of them.
//
// Compile-time settings: FP16, WEIGHTS, NT (tokens a tile), R, WR, WK, KS (K a stage: 256), STAGES, CLUSTER, CTAS (blocks a
// multiprocessor), SCALES, CODEBOOK, the 16 values in 16 bits, and DYNAMIC_MAP, the 256 levels of scales.

#include "hopper.h"
#include "epilogue.h"
#include "weights.h"

constexpr int ROWS = 16 * R * WR;                  // rows of W a tile
constexpr int WARPS = WR * WK;                     // consumers
constexpr int THREADS = 32 * WARPS + 32;
constexpr int RB = KS / 2;                         // bytes of codes a row and stage
constexpr int NB = KS / 64;                        // 64-blocks a stage
constexpr int BLOCKS = NB / WK;                    // of these a warp multiplies
constexpr int W_BYTES = ROWS * RB;
constexpr int X_BYTES = NT * 128;                  // one 64-wide slice of x
constexpr int X_STAGE = X_BYTES * NB;
constexpr int LUT_OFFSET = STAGES * (W_BYTES + X_STAGE);
constexpr int MAP_OFFSET = LUT_OFFSET + 65536;
constexpr int BAR_OFFSET = MAP_OFFSET + 1024;
constexpr int SCALE_OFFSET = BAR_OFFSET + 16 * STAGES;
constexpr int SCALE_PITCH = 16 * SCALES;           // bytes
constexpr int PITCH = ROWS + 4;                    // floats a token in the epilogue's buffer
constexpr int TILES = NT / 8;                      // of tokens, in one instruction each
constexpr int VALUES = (16 * R * BLOCKS + 31) / 32;  // scales a lane decodes a stage

static_assert(KS == 256 && NB % WK == 0, "a stage is four blocks, shared out to the warps along K");
static_assert(SCALES % 2 == 1, "rows of scales lie in different banks");
static_assert(WK * NT * PITCH * 4 <= LUT_OFFSET, "the sums of all parts fit where the stages were");

__device__ __forceinline__ void prefetch_tile(const TensorMap* map, int x, int y) {  // into L2 only
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}
// Four 8x8 matrices of 16-bit units: lane l gives a row's address, and gets the 4 bytes at 4 (l % 4) of row l / 4 of each.
__device__ __forceinline__ void load_matrices(u32 (&v)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}
// The pair of byte I of a word: that byte moves to bits 8-15 above the lane's own 4 * lane, which is the address within the
// table: its entries are 256 bytes apart for this one instruction's sake. Nothing writes the table, so this needs no order.
template <int I> __device__ __forceinline__ u32 byte_pair(u32 word, u32 lane4, u32 table) {
  u32 at, pair;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(at) : "r"(word), "r"(lane4), "n"(0x5504 | I << 4));
  asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at + table));
  return pair;
}
#if FP16
#define KIND "f16"
#else
#define KIND "bf16"
#endif
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__constant__ u16 codebook[16] = {CODEBOOK};
__device__ const float dynamic_map[256] = {DYNAMIC_MAP};

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
  const int token0 = blockIdx.y * NT;
  const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;

  // This block's stages; the copy engine fills what lies beyond K with zeros.
  const int all = (K + KS - 1) / KS, share = (all + CLUSTER - 1) / CLUSTER, begin = min(all, (int)rank * share);
  const int steps = min(share, all - begin);

  auto fetch = [&](int step, int slot) {
    const int k = (begin + step) * KS;
    const u32 bar = full + 8 * slot;
    barrier_expect(bar, W_BYTES + X_STAGE);
    copy_tile(base + slot * W_BYTES, &map_w, k / 2, row0, bar);
#pragma unroll
    for (int c = 0; c < NB; c++) copy_tile(x_base + slot * X_STAGE + c * X_BYTES, &map_x, k + 64 * c, token0, bar);
  };
  if (thread == 32 * WARPS) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPS);
    }
    barriers_are_ready();
    // A read into L2 is harmless even where the kernel before this one still writes these codes.
    for (int step = 0; step < STAGES && step < steps; step++) prefetch_tile(&map_w, (begin + step) * KS / 2, row0);
  }
  if (thread < 32 * WARPS) {
    for (int i = thread; i < 2048; i += 32 * WARPS) {  // 16 bytes each: a quarter of an entry's row of 32 copies
      const u32 pair = (u32)codebook[i >> 7] | (u32)codebook[(i >> 3) & 15] << 16;  // the even element is the high nibble
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(base + LUT_OFFSET + (i >> 3) * 256 + (i & 7) * 16), "r"(pair) : "memory");
    }
    for (int i = thread; i < 256; i += 32 * WARPS)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(base + MAP_OFFSET + i * 4), "f"(dynamic_map[i]) : "memory");
  }
  // Up to here nothing was read that an earlier kernel may have written, and that one may still run.
  wait_for_previous_kernel();
  if (thread == 32 * WARPS) {
    for (int step = 0; step < STAGES && step < steps; step++) fetch(step, step);
  } else if (thread < 32 * WARPS) {
    // What lies beyond the last row or column stays as it is: any byte is a finite scale.
    const int first_chunk = begin / 4, chunks = min(SCALES, K / 1024 - first_chunk);
    for (int i = thread; i < ROWS * SCALES; i += 32 * WARPS) {
      const int row = i / SCALES, chunk = i % SCALES;
      if (row0 + row < N && chunk < chunks)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(base + SCALE_OFFSET + row * SCALE_PITCH + chunk * 16),
                     "l"((const u8*)absmax + (size_t)(row0 + row) * (K / 64) + (first_chunk + chunk) * 16) : "memory");
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
  }
  __syncthreads();

  if (warp == WARPS) {
    if (lane == 0)
      for (int step = STAGES, slot = 0, phase = 0; step < steps; step++) {
        barrier_wait(empty + 8 * slot, phase);
        fetch(step, slot);
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
  } else {
    const int warp_k = warp % WK, first_row = warp / WK * 16 * R;
    const int g = lane >> 2, t = lane & 3;
    const u32 table = base + LUT_OFFSET, lane4 = lane * 4;
    const float shift = *offset;

    // Scale i = 32 v + lane of this warp: of row i % (16 R) and of the stage's block warp_k * BLOCKS + i / (16 R).
    float raw[VALUES], factor[VALUES];  // one stage ahead: nested absmax; the scale of the stage in hand
    u32 code[VALUES], had[VALUES], codes_at[VALUES];  // code of the scale; which nested absmax `raw` is; the row's codes
    bool there[VALUES];
    uint4 ready[VALUES];  // 16 codes of a row: those of 4 stages
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
      const int local = first_row + (32 * v + lane) % (16 * R);
      codes_at[v] = base + SCALE_OFFSET + local * SCALE_PITCH;
      there[v] = row0 + local < N;
      raw[v] = 0.f, had[v] = ~0u;
    }
    auto fetch_scales = [&](int step) {
      if (step >= steps) return;
      const int stage = begin + step;
#pragma unroll
      for (int v = 0; v < VALUES; v++) {
        const int i = 32 * v + lane, block = warp_k * BLOCKS + min(i / (16 * R), BLOCKS - 1);
        if (stage % 4 == 0 || step == 0) ready[v] = load_shared16(codes_at[v] + (stage / 4 - begin / 4) * 16);
        const uint4 q = ready[v];
        code[v] = (stage & 2 ? stage & 1 ? q.w : q.z : stage & 1 ? q.y : q.x) >> 8 * block & 255;
        const u32 nested = ((u32)(row0 + first_row + i % (16 * R)) * (u32)(K / 64) + stage * NB + block) >> 8;
        if (there[v] && had[v] != nested) raw[v] = nested_absmax[nested], had[v] = nested;
      }
    };
    auto decode_scales = [&]() {
#pragma unroll
      for (int v = 0; v < VALUES; v++) {
        float level;
        asm("ld.shared.f32 %0, [%1];" : "=f"(level) : "r"(base + MAP_OFFSET + code[v] * 4));
        factor[v] = __fadd_rn(__fmul_rn(level, raw[v]), shift);
      }
    };

    float acc[R][TILES][4];
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[r][n][i] = 0.f;

    // Lane l gives ldmatrix row l % 16, 16 bytes number l / 16 of a block; x's row of token (g / 2) + 4 (g % 2) of 8, so that 8 lanes read all banks.
    u32 at_w[BLOCKS], at_x[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int block = warp_k * BLOCKS + b, row = first_row + (lane & 15), token = g >> 1 | (g & 1) << 2;
      const u32 swizzle = ((u32)row * RB >> 7) & (RB / 16 - 1);
      at_w[b] = base + row * RB + (((block * 2 + (lane >> 4)) ^ swizzle) << 4);
      at_x[b] = x_base + block * X_BYTES + token * 128 + ((t ^ token) << 4);
    }
    auto multiply = [&](int slot) {
      u32 w[BLOCKS][R][4];
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int r = 0; r < R; r++) load_matrices(w[b][r], at_w[b] + slot * W_BYTES + r * 16 * RB);
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        uint4 x[TILES][2];
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          const u32 at = at_x[b] + slot * X_STAGE + n * 1024;
          x[n][0] = load_shared16(at), x[n][1] = load_shared16(at ^ 64);
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
          float part[TILES][4];
#pragma unroll
          for (int n = 0; n < TILES; n++) part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0.f;
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const u32 top = w[b][r][2 * half], low = w[b][r][2 * half + 1];
            const u32 a0[4] = {byte_pair<0>(top, lane4, table), byte_pair<0>(low, lane4, table),
                               byte_pair<1>(top, lane4, table), byte_pair<1>(low, lane4, table)};
            const u32 a1[4] = {byte_pair<2>(top, lane4, table), byte_pair<2>(low, lane4, table),
                               byte_pair<3>(top, lane4, table), byte_pair<3>(low, lane4, table)};
#pragma unroll
            for (int n = 0; n < TILES; n++) {
              mma(part[n], a0, x[n][half].x, x[n][half].y);
              mma(part[n], a1, x[n][half].z, x[n][half].w);
            }
          }
          constexpr int PER = 16 * R;
          const int v = (b * PER + 16 * r) / 32, from = (b * PER + 16 * r) % 32;
          const float s0 = __shfl_sync(~0u, factor[v], from + g), s1 = __shfl_sync(~0u, factor[v], from + 8 + g);
#pragma unroll
          for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[r][n][i] = fmaf(part[n][i], i & 2 ? s1 : s0, acc[r][n][i]);
        }
      }
    };

    if (steps > 0) {
      fetch_scales(0);
      int slot = 0;
      u32 phase = 0;
      for (int step = 0; step < steps; step++) {
        decode_scales();
        fetch_scales(step + 1);
        barrier_wait(full + 8 * slot, phase);
        multiply(slot);
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * slot);
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
    }

    // Parts meet in shared memory, [WK][NT][PITCH] floats over the stages, once no consumer needs those.
    sync_some<1, 32 * WARPS>();
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int token = n * 8 + t + (i & 1) * 4, row = first_row + r * 16 + g + (i & 2) * 4;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(base + ((warp_k * NT + token) * PITCH + row) * 4), "f"(acc[r][n][i]) : "memory");
        }
  }
  store_sums<NT, ROWS, PITCH, WK, THREADS, CLUSTER>(base, rank, thread, token0, row0, M, N, out, [&](float v, int n) { return v + (bias && n < N ? from_half(bias[n]) : 0.f); });
}
