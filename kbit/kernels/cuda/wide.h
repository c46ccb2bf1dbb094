// Products of more than 128 tokens with a 4-bit weight on Hopper, and of more than 64 with an int8 one whose inputs stay in 16 bits,
// where the tensor cores set the time.
//
//   out[M, N] = x[M, K] W[N, K]^T + bias, W in NF4 or FP4 (row layout, blocks of 64 and up) or in int8 by rows, x in bf16 or fp16
//
// Computed as W x^T, decoded in registers as in linear_4bit.cu: the left operand of the tensor cores never passes through shared
// memory, whose bandwidth (one wgmma of 64 x NT x 16 reads NT x 32 bytes) is what runs out first. Two warpgroups have 64 features by NT
// tokens each; of a third one, one warp fetches codes and inputs with the bulk tensor copy engine, and three decode the scales of 4-bit
// blocks, in turns. An int8 code is exact in 16 bits; the scale of its row is applied to the sum.
// A pair of thread blocks (a cluster) works on 256 features and the same tokens; each fetches half of the inputs for both, so that L2
// sends them once.
//
// Thread blocks persist; tiles that do not fill whole waves are cut along K into equal shares (stream_k.h).
//
// Compile-time settings: BITS (4 or 8), FP16, NT (a multiple of 32), WIDE_STAGES; of 4 bits NESTED (double-quantized scales; then DYNAMIC_MAP, their
// 256 levels), and CODEBOOK, the 16 values in 16 bits. wgmma.h is generated for NT.

#include "stream_k.h"
#include "wgmma.h"

namespace wide {

constexpr int THREADS = 384, SCALE_WARPS = 3;
constexpr int TILE = 256;                    // features a cluster; each of its thread blocks has half
constexpr int X_BYTES = NT * 128;            // 64 of K
constexpr int C_BYTES = 128 * 8 * BITS;
constexpr int S_BYTES = BITS == 4 ? 128 * 4 : 0;  // a scale in 16 bits, twice
constexpr int C_OFFSET = WIDE_STAGES * X_BYTES;
constexpr int LUT_OFFSET = C_OFFSET + WIDE_STAGES * C_BYTES;
constexpr int S_OFFSET = LUT_OFFSET + (BITS == 4 ? 65536 : 0);
constexpr int OUT_OFFSET = S_OFFSET + WIDE_STAGES * S_BYTES;  // 16 tokens of 64 features, twice, for both groups
constexpr int MAP_OFFSET = OUT_OFFSET + 8192;
constexpr int BAR_OFFSET = MAP_OFFSET + (BITS == 4 ? 1024 : 0);
constexpr int ACC = NT / 2;                  // accumulators a thread

template <int V> struct Int { static constexpr int value = V; };

static_assert(NT % 32 == 0, "two buffers of 16 tokens take turns");

#if BITS == 4
// The pair of one byte of a word. `select` moves that byte to bits 8-15 above the lane's own 4 * lane, which is the
// address within the table: its entries are 256 bytes apart for this one instruction's sake.
__device__ __forceinline__ u32 byte_pair(u32 word, u32 lane4, u32 select, u32 table) {
  u32 at, pair;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(at) : "r"(word), "r"(lane4), "r"(select));
  asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at + table));
  return pair;
}

#if NESTED
__device__ const float dynamic_map[256] = {DYNAMIC_MAP};
#endif
#endif

// Where a tile lies. Tiles that run at one time are 4 of tokens by many of features, whatever M is: then inputs come from L2 again and
// again, and what is read from memory more than once is 4-bit codes.
struct Place {
  int feature0, token0;
  __device__ Place(int tile, int feature_tiles, int token_tiles) {
    const int band = tile / (4 * feature_tiles), in_band = tile - band * 4 * feature_tiles, wide = min(4, token_tiles - 4 * band);
    feature0 = in_band / wide * TILE, token0 = (4 * band + in_band % wide) * NT;
  }
};

// The share of one thread block, `block` of `blocks`, for all its threads; pairs of neighbours belong together, in clusters of BLOCKS. base: of
// its shared memory, on a boundary of 1024 bytes. WAIT: for the kernel before this one. nested_absmax, offset, block_shift: of 4 bits.
template <int BLOCKS, bool WAIT>
__device__ __forceinline__ void multiply(u32 base, const TensorMap& map_w, const TensorMap& map_x, int block, int blocks,
                                         const void* __restrict__ absmax, const float* __restrict__ nested_absmax,
                                         const float* __restrict__ offset, const u16* __restrict__ bias, u16* __restrict__ out,
                                         float4* workspace, u64* flags, u64 launch, int M, int N, int K, int block_shift, int shared_tiles) {
  const u32 full = base + BAR_OFFSET, empty = full + 8 * WIDE_STAGES;
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread >> 5, 0), lane = thread & 31;
  const u32 in_cluster = cluster_rank(), rank = BLOCKS > 2 ? in_cluster & 1 : in_cluster, first = BLOCKS > 2 ? in_cluster & ~1u : 0;
  const int token_tiles = (M + NT - 1) / NT, feature_tiles = (N + TILE - 1) / TILE, tiles = feature_tiles * token_tiles;
  const int pair = block >> 1;
  Work work(pair, blocks >> 1, tiles, shared_tiles, BITS == 4 ? K / 64 : (K + 63) / 64);  // the copy engine fills what lies beyond K with zeros

  // Each role prepares what it needs by itself, so that the first copies start at once.
  if (thread == THREADS - 128) {
    // Full: the copies' thread and a warp of scales. Empty: all warps that multiply, of both thread blocks, since both write to it.
    for (int s = 0; s < WIDE_STAGES; s++) barrier_init(full + 8 * s, BITS == 4 ? 2 : 1), barrier_init(empty + 8 * s, 16);
    barriers_are_ready();
  }
  __syncwarp();
  cluster_arrive();
  auto wait_for_others = [&]() {
    cluster_wait();
    if (WAIT) wait_for_previous_kernel();
  };

  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    Ring<WIDE_STAGES> ring;
    if (warp == 8) {
      wait_for_others();
      if (lane == 0)
        while (work.advance()) {
          const Place place(work.tile, feature_tiles, token_tiles);
          const int feature0 = place.feature0 + rank * 128, token0 = place.token0 + rank * (NT / 2);
          for (int step = work.begin; step < work.begin + work.steps; step++) {
            const u32 bar = full + 8 * ring.slot;
            barrier_wait(empty + 8 * ring.slot, ring.phase ^ 1);
            barrier_expect(bar, X_BYTES + C_BYTES);
            copy_tile(base + C_OFFSET + ring.slot * C_BYTES, &map_w, step * 8 * BITS, feature0, bar);
            copy_tile_to<2>(base + ring.slot * X_BYTES + rank * (X_BYTES / 2), &map_x, step * 64, token0, bar, first);
            ring.advance();
          }
        }
    }
#if BITS == 4
    else {
#if NESTED
      for (int i = thread - (THREADS - 96); i < 256; i += 96)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(base + MAP_OFFSET + i * 4), "f"(dynamic_map[i]) : "memory");
      sync_some<3, 96>();
#endif
      wait_for_others();
      const float shift = NESTED ? *offset : 0.f;
      const u8* const scale_codes = (const u8*)absmax;
      const float* const scales = (const float*)absmax;
      const u32 row_blocks = (u32)K >> block_shift;
      int turn = warp - 9;
      while (work.advance()) {
        const int feature0 = Place(work.tile, feature_tiles, token_tiles).feature0 + rank * 128 + lane;
        for (int step = work.begin; step < work.begin + work.steps; step++, ring.advance()) {
          if (turn) {
            turn--;
            continue;
          }
          turn = SCALE_WARPS - 1;
          float raw[4];
          u32 code[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int n = feature0 + 32 * i;
            const u32 index = (u32)n * row_blocks + ((u32)step * 64 >> block_shift);
            raw[i] = 0.f;
            code[i] = 0;
            if (n < N) {
              if (NESTED) {
                asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(code[i]) : "l"(scale_codes + index) : "memory");
                asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(raw[i]) : "l"(nested_absmax + (index >> 8)) : "memory");
              } else {
                asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(raw[i]) : "l"(scales + index) : "memory");
              }
            }
          }
          barrier_wait(empty + 8 * ring.slot, ring.phase ^ 1);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float factor = raw[i];
            if (NESTED) {
              float level;
              asm volatile("ld.shared.f32 %0, [%1];" : "=f"(level) : "r"(base + MAP_OFFSET + code[i] * 4));
              // Beyond the last row this is the offset: finite, and never stored.
              factor = __fadd_rn(__fmul_rn(level, raw[i]), shift);
            }
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + S_OFFSET + ring.slot * S_BYTES + (lane + 32 * i) * 4),
                         "r"(to_half(factor) * 0x10001u) : "memory");
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(full + 8 * ring.slot);
        }
      }
    }
#endif
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = warp >> 2, in_group = thread & 127, t = lane & 3;
    const int row = warp * 16 + (lane >> 2);  // this lane's features: row and row + 8
#if BITS == 4
    const u32 chunk0 = base + C_OFFSET + row * 32 + ((row >> 2 & 1) << 4), chunk1 = base + C_OFFSET + row * 32 + ((~row >> 2 & 1) << 4);
    const u32 table = base + LUT_OFFSET, lane4 = lane * 4, select = 0x5504u | t << 4;
    // The table: entry e has 32 copies of codebook[e >> 4] (the even element is the high nibble) and codebook[e & 15]. Picked among
    // constants, since a first read of constant memory would take longer than all of this.
    const u16 codebook[16] = {CODEBOOK};
    u32 odd = 0;
#pragma unroll
    for (int i = 0; i < 16; i++)
      odd |= -(u32)((thread >> 3 & 15) == i) & (u32)codebook[i] << 16;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const u32 pair = odd | codebook[2 * i] ^ (codebook[2 * i] ^ codebook[2 * i + 1]) & -(u32)(thread >> 7);
      store16(table + ((thread >> 3) + 32 * i) * 256 + (thread & 7) * 16, pair, pair, pair, pair);
    }
    sync_some<4, 256>();
#else
    const u32 codes = base + C_OFFSET + row * 64 + 2 * t;
#endif
    wait_for_others();

    float acc[ACC];
    u32 a[2][16];
    Ring<WIDE_STAGES> ring;
    auto release = [&](int slot) {
      __syncwarp();
      if (lane < 2) barrier_arrive_at(empty + 8 * slot, first + lane);
    };
    auto group_sync = [&]() {
      if (group) sync_some<2, 128>();
      else sync_some<1, 128>();
    };
    // One step: its codes are decoded while the tensor cores multiply the step before, then it is queued behind that one.
    int before = 0, last = 0;  // slots of the two steps before
    auto multiply = [&](auto parity, int step) {
      constexpr int P = decltype(parity)::value;
      const int slot = ring.slot;
      barrier_wait(full + 8 * slot, ring.phase);
#if BITS == 4
      const uint4 q0 = load_shared16(chunk0 + slot * C_BYTES), q1 = load_shared16(chunk1 + slot * C_BYTES);
      const uint4 q2 = load_shared16(chunk0 + slot * C_BYTES + 256), q3 = load_shared16(chunk1 + slot * C_BYTES + 256);
      const u32 scales = base + S_OFFSET + slot * S_BYTES + row * 4, h0 = load_shared(scales), h1 = load_shared(scales + 32);
#else
      u32 pair[16];  // the 16-byte pieces of a row are swizzled by pairs of rows: eight rows' lie in different banks
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const u32 at = codes + slot * C_BYTES + (((i >> 1) ^ (row >> 1 & 3)) << 4) + 8 * (i & 1);
        pair[2 * i] = load_pair(at), pair[2 * i + 1] = load_pair(at + 8 * 64);
      }
#endif
      if (step > 1) {  // the registers of two steps before are free
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        release(before);
      }
#if BITS == 4
      const u32 top[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
      const u32 low[8] = {q2.x, q2.y, q2.z, q2.w, q3.x, q3.y, q3.z, q3.w};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        a[P][2 * i] = times(byte_pair(top[i], lane4, select, table), h0);
        a[P][2 * i + 1] = times(byte_pair(low[i], lane4, select, table), h1);
      }
#else
#pragma unroll
      for (int i = 0; i < 16; i++) a[P][i] = widen_codes<0x4140>(pair[i]);
#endif
      // 128-byte swizzled K-major x: 8 tokens are 1024 bytes; 16 elements further in K are 32 bytes further.
      const u32 x = base + slot * X_BYTES;
      const u64 descriptor = (u64)((x & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < 4; i++) wgmma(acc, a[P] + 4 * i, descriptor + 2 * i, 1);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      before = last, last = slot;
      ring.advance();
    };
    while (work.advance()) {
#pragma unroll
      for (int i = 0; i < ACC; i++) acc[i] = 0.f;
      for (int step = 0; step < work.steps; step += 2) {
        multiply(Int<0>(), step);
        if (step + 1 < work.steps) multiply(Int<1>(), step + 1);
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < ACC; i++) asm volatile("" : "+f"(acc[i])::"memory");
      if (work.steps > 1) release(before);
      release(last);

      if (!work.ends_tile()) {
        leave_sums(acc, workspace, flags, launch, block * 2 + group, in_group, group_sync);
        continue;
      }
      if (work.begin > 0) add_sums(acc, work, pair, workspace, flags, launch, rank * 2 + group, in_group, group_sync);
      // A warp has 16 features by NT tokens; the output wants features side by side. The four warps of a group put 16 tokens of their 64
      // features into shared memory and write whole lines.
      const Place place(work.tile, feature_tiles, token_tiles);
      const int token0 = place.token0, feature0 = place.feature0 + rank * 128;
      float bias0 = 0.f, bias1 = 0.f;
#if BITS == 8
      const float scale0 = ((const float*)absmax)[min(feature0 + row, N - 1)] * 0.007874015748031496f;
      const float scale1 = ((const float*)absmax)[min(feature0 + row + 8, N - 1)] * 0.007874015748031496f;
#pragma unroll
      for (int i = 0; i < ACC; i++) acc[i] = __fmul_rn(acc[i], i & 2 ? scale1 : scale0);
#endif
      if (bias) {
        const int f = feature0 + row;
        if (f < N) bias0 = from_half(bias[f]);
        if (f + 8 < N) bias1 = from_half(bias[f + 8]);
      }
      const u32 buffer = base + OUT_OFFSET + group * 4096;
      const int put_token = (lane >> 4) * 8 + (lane & 7), put_chunk = (warp & 3) * 2 + (lane >> 3 & 1);  // chunks of 8 features
      const int get_token = in_group >> 3, get_chunk = in_group & 7, f = feature0 + group * 64 + get_chunk * 8;
      const u32 put = buffer + put_token * 128 + ((put_chunk ^ (put_token & 7)) << 4);
      const u32 get = buffer + get_token * 128 + ((get_chunk ^ (get_token & 7)) << 4);
#pragma unroll
      for (int j = 0; j < NT / 16; j++) {
        const float* const d = acc + 8 * j;
        const u32 p0 = to_halves(d[0] + bias0, d[1] + bias0), p1 = to_halves(d[2] + bias1, d[3] + bias1);
        const u32 p2 = to_halves(d[4] + bias0, d[5] + bias0), p3 = to_halves(d[6] + bias1, d[7] + bias1);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(put + (j & 1) * 2048), "r"(p0), "r"(p1),
                     "r"(p2), "r"(p3) : "memory");
        group_sync();  // one is enough: who writes here again has passed the next one, behind all reads of this
        const uint4 v = load_shared16(get + (j & 1) * 2048);
        const int token = token0 + 16 * j + get_token;
        if (token < M) {
          u16* const to = out + (size_t)token * N + f;
          if ((N & 7) == 0) {
            if (f < N) *(uint4*)to = v;
          } else {
            const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 8; i++)
              if (f + i < N) to[i] = (u16)(word[i >> 1] >> 16 * (i & 1));
          }
        }
      }
    }
  }
  cluster_sync();  // nobody leaves while the other one may still write to it
}

}  // namespace wide
