// The gradient to the input of a 4-bit layer on Hopper, from some tokens on, where the tensor cores set the time.
//
//   out[M, K] = x[M, N] W[N, K]       x: the gradient of the layer's output
//
// W in NF4 or FP4 (row layout, blocks of 64 and up), x in bf16 or fp16. Computed as W^T x^T: one warpgroup decodes the weights of
// a step (64 of N by 128 features, which are columns of W) into shared memory in 16 bits, scales applied; two warpgroups do nothing but
// multiply (64 features by NT tokens each); the bulk tensor copy engine fetches inputs. A pair of thread blocks (a cluster) works
// on 256 features and the same tokens; each fetches half of the inputs for both. The tensor cores read a tile of shared memory
// transposed as well as not.
//
// A byte of codes is two weights side by side: a table of all 256 pairs, of which every lane owns a copy in its own bank, turns it into
// 32 bits of the tile with one look-up. The threads that multiply also copy the codes, several steps ahead.
//
// Thread blocks persist; tiles that do not fill whole waves are cut along N into equal shares (stream_k.h).
//
// Compile-time settings: FP16, NT, STAGES (of inputs and decoded weights), CS (of codes), CONSUMER_REGISTERS, DECODER_REGISTERS, NESTED
// (double-quantized scales; then DYNAMIC_MAP, their 256 levels), and CODEBOOK, the 16 values in 16 bits. wgmma.h is generated for NT.

#include "hopper.h"
#include "stream_k.h"
#include "wgmma.h"

constexpr int DECODERS = 128, CONSUMERS = 256;
constexpr int THREADS = CONSUMERS + DECODERS;
constexpr int TILE = 256;                    // features a cluster; each of its thread blocks has half
constexpr int X_BYTES = NT * 128;            // 64 of N
constexpr int W_BYTES = 128 * 128;
constexpr int C_BYTES = 128 * 32;
constexpr int W_OFFSET = STAGES * X_BYTES;
constexpr int C_OFFSET = W_OFFSET + STAGES * W_BYTES;
constexpr int OUT_OFFSET = C_OFFSET + CS * C_BYTES;  // 1 KB a consumer warp
constexpr int MAP_OFFSET = OUT_OFFSET + 8192;
constexpr int SCALE_OFFSET = MAP_OFFSET + 1024;     // of 8 steps
constexpr int LUT_OFFSET = SCALE_OFFSET + 4096;    // word 32 e + l: lane l's copy of entry e
constexpr int BAR_OFFSET = LUT_OFFSET + 32768;
constexpr int ACC = NT / 2;                  // accumulators a thread


__constant__ u16 codebook[16] = {CODEBOOK};
#if NESTED
__device__ const float dynamic_map[256] = {DYNAMIC_MAP};
#endif

struct Cursor {  // a step of the pieces
  Work work;
  int token_tiles, row_tile, step;
  bool more;
  __device__ Cursor(const Work& start, int token_tiles) : work(start), token_tiles(token_tiles) { next(); }
  __device__ void next() { more = work.advance(), step = work.begin, row_tile = work.tile / token_tiles; }
  __device__ void advance() {
    if (++step == work.begin + work.steps) next();
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(2, 1, 1)
linear_4bit_grad_input(const __grid_constant__ TensorMap map_x, const u8* __restrict__ weight, const void* __restrict__ absmax,
                       const float* __restrict__ nested_absmax, const float* __restrict__ offset, u16* __restrict__ out,
                       float4* workspace, u64* flags, u64 launch, int M, int N, int K, int block_shift, int shared_tiles) {
  extern __shared__ u8 raw_shared[];
  const u32 base = (shared_address(raw_shared) + 1023) & ~1023u;
  const u32 full = base + BAR_OFFSET, empty = full + 8 * STAGES, full_c = empty + 8 * STAGES;
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread >> 5, 0), lane = thread & 31;
  const u32 rank = cluster_rank();
  const int token_tiles = (M + NT - 1) / NT, tiles = (K + TILE - 1) / TILE * token_tiles;
  const int cluster = blockIdx.x >> 1, clusters = gridDim.x >> 1;
  Work work(cluster, clusters, tiles, shared_tiles, (N + 63) / 64);

  if (thread == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s, 5), barrier_init(empty + 8 * s, 4);
    for (int s = 0; s < CS; s++) barrier_init(full_c + 8 * s, CONSUMERS);
    barriers_are_ready();
  }
  for (int i = thread; i < 2048; i += THREADS) {  // 16 bytes each: the even element is the high nibble
    const u32 pair = (u32)codebook[i >> 7] | (u32)codebook[(i >> 3) & 15] << 16;
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(base + LUT_OFFSET + i * 16), "r"(pair) : "memory");
  }
#if NESTED
  for (int i = thread; i < 256; i += THREADS)
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(base + MAP_OFFSET + i * 4), "f"(dynamic_map[i]) : "memory");
#endif
  __syncthreads();
  cluster_sync();
  // Up to here nothing was read that an earlier kernel may have written, and that one may still run.
  wait_for_previous_kernel();

  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(DECODER_REGISTERS));
    // A thread decodes half a row of the tile, 64 weights with one scale.
    const int me = thread - CONSUMERS;
    const int row = me & 63, side = me >> 6;
    const u32 row32 = base + C_OFFSET + me * 32, read0 = row32 + ((lane >> 2 & 1) << 4), read1 = row32 + ((~lane >> 2 & 1) << 4);
    const u32 write = base + W_OFFSET + side * 8192 + row * 128;
    const u32 scale_at = base + SCALE_OFFSET + me * 4;
    const float shift = NESTED ? *offset : 0.f;
    const u8* const scale_codes = (const u8*)absmax;
    const float* const scales = (const float*)absmax;
    const u32 row_blocks = (u32)K >> block_shift;
    Ring<CS> codes;
    const u32 table = base + LUT_OFFSET + lane * 4;
    Ring<STAGES> ring;
    while (work.advance()) {
      const int feature0 = work.tile / token_tiles * TILE + rank * 128, token0 = work.tile % token_tiles * NT + rank * (NT / 2);
      // Scales of 8 steps at a time, through this thread's own places in shared memory. The fence below waits for all loads in flight,
      // so that a load a step would make every step as long as a load.
      auto fetch_scales = [&](int step) {
        float raw[8];
        u32 code[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int n = (step + i) * 64 + row, k = feature0 + side * 64;
          const u32 index = (u32)n * row_blocks + ((u32)k >> block_shift);
          raw[i] = 0.f;
          code[i] = 0;
          if (n < N && k < K) {
            // volatile: all of them before the first use
            if (NESTED) {
              asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(code[i]) : "l"(scale_codes + index) : "memory");
              asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(raw[i]) : "l"(nested_absmax + (index >> 8)) : "memory");
            } else {
              asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(raw[i]) : "l"(scales + index) : "memory");
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float factor = raw[i];
          if (NESTED) {
            float level;
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(level) : "r"(base + MAP_OFFSET + code[i] * 4));
            // Beyond the last row and column this is the offset: finite, and multiplied by inputs of 0 or never stored.
            factor = __fadd_rn(__fmul_rn(level, raw[i]), shift);
          }
          asm volatile("st.shared.u32 [%0], %1;" ::"r"(scale_at + i * 512), "r"(to_half(factor) * 0x10001u) : "memory");
        }
      };
      for (int step = work.begin; step < work.begin + work.steps; step++) {
        if ((step - work.begin & 7) == 0) fetch_scales(step);
        u32 scale;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scale) : "r"(scale_at + (step - work.begin & 7) * 512));
        barrier_wait(full_c + 8 * codes.slot, codes.phase);
        const uint4 q0 = load_shared16(read0 + codes.slot * C_BYTES), q1 = load_shared16(read1 + codes.slot * C_BYTES);
        const u32 words[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
        u32 pair[8][4];
#pragma unroll
        for (int c = 0; c < 8; c++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const u32 at = (i ? words[c] >> (8 * i - 7) : words[c] << 7) & 0x7f80;
            asm("ld.shared.u32 %0, [%1];" : "=r"(pair[c][i]) : "r"(at + table));
          }
#pragma unroll
        for (int c = 0; c < 8; c++)
#pragma unroll
          for (int i = 0; i < 4; i++) pair[c][i] = times(pair[c][i], scale);
        barrier_wait(empty + 8 * ring.slot, ring.phase ^ 1);
        if (me == 0) {  // half of the inputs, for both thread blocks
          const u32 bar = full + 8 * ring.slot;
          barrier_expect(bar, X_BYTES);
          copy_tile_to<2>(base + ring.slot * X_BYTES + rank * (X_BYTES / 2), &map_x, step * 64, token0, bar);
        }
#pragma unroll
        for (int c = 0; c < 8; c++)
          asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(write + ring.slot * W_BYTES + ((c ^ (row & 7)) << 4)), "r"(pair[c][0]),
                       "r"(pair[c][1]), "r"(pair[c][2]), "r"(pair[c][3]) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0) barrier_arrive(full + 8 * ring.slot);
        codes.advance();
        ring.advance();
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    const int group = warp >> 2, in_group = thread & 127;
    float acc[ACC];
    Ring<STAGES> ring;
    Cursor ahead(work, token_tiles);  // what is fetched next of the codes
    Ring<CS> codes;
    // A step's codes: 16 bytes a thread. The threads that multiply fetch them, having time: the fence of those that decode waits for
    // all their accesses to memory.
    auto fetch_codes = [&]() {
      if (!ahead.more) return;
      const int r = thread >> 1, part = thread & 1, feature0 = ahead.row_tile * TILE + rank * 128;
      const int n = ahead.step * 64 + (r & 63), k = feature0 + (r & 64);
      const u32 to = base + C_OFFSET + codes.slot * C_BYTES + r * 32 + ((part ^ (r >> 2 & 1)) << 4);
      const bool inside = n < N && k < K;
      const u8* const from = weight + (inside ? (size_t)n * (K / 2) + k / 2 + part * 16 : 0);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%3];" ::"r"(to), "l"(from),
                   "r"(inside ? 16 : 0), "r"(full_c + 8 * codes.slot) : "memory");
      codes.advance();
      ahead.advance();
    };
    for (int i = 0; i < CS; i++) fetch_codes();
    auto release = [&](int slot) {  // in both thread blocks, since both write to it
      if (in_group == 0 || in_group == 32) barrier_arrive_at(empty + 8 * slot, in_group >> 5);
    };
    auto group_sync = [&]() {
      if (group) sync_some<2, 128>();
      else sync_some<1, 128>();
    };
    const u64 layout = (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;  // 128-byte swizzle, 1024 bytes to the next 8 rows
    while (work.advance()) {
#pragma unroll
      for (int i = 0; i < ACC; i++) acc[i] = 0.f;
      int old = 0;
      for (int step = 0; step < work.steps; step++) {
        barrier_wait(full + 8 * ring.slot, ring.phase);
        const u32 a = base + W_OFFSET + ring.slot * W_BYTES + group * 8192, b = base + ring.slot * X_BYTES;
        const u64 descriptor_a = (a & 0x3ffff) >> 4 | layout, descriptor_b = (b & 0x3ffff) >> 4 | layout;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < 4; i++)  // 16 further in N: 16 rows further, and 32 bytes along a row of inputs
          wgmma(acc, descriptor_a + 128 * i, descriptor_b + 2 * i);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        fetch_codes();  // into the place of this step's, which are decoded
        if (step) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          release(old);
        }
        old = ring.slot;
        ring.advance();
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < ACC; i++) asm volatile("" : "+f"(acc[i])::"memory");
      release(old);

      if (!work.ends_tile()) {
        leave_sums(acc, workspace, flags, launch, blockIdx.x * 2 + group, in_group, group_sync);
        continue;
      }
      if (work.begin > 0) add_sums(acc, work, cluster, workspace, flags, launch, rank * 2 + group, in_group, group_sync);
      // A warp has 16 features by NT tokens; the output wants features side by side.
      const int token0 = work.tile % token_tiles * NT, feature0 = work.tile / token_tiles * TILE + rank * 128 + warp * 16;
      const u32 buffer = base + OUT_OFFSET + warp * 1024;
      const int put_token = (lane >> 4) * 8 + (lane & 7), get_token = lane >> 1, f = feature0 + (lane & 1) * 8;
      const u32 put = buffer + put_token * 32 + (((lane >> 3 & 1) ^ (put_token >> 2 & 1)) << 4);
      const u32 get = buffer + get_token * 32 + (((lane & 1) ^ (get_token >> 2 & 1)) << 4);
#pragma unroll
      for (int j = 0; j < NT / 16; j++) {
        const float* const d = acc + 8 * j;
        const u32 p0 = to_halves(d[0], d[1]), p1 = to_halves(d[2], d[3]), p2 = to_halves(d[4], d[5]), p3 = to_halves(d[6], d[7]);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(put + (j & 1) * 512), "r"(p0), "r"(p1),
                     "r"(p2), "r"(p3) : "memory");
        __syncwarp();
        const uint4 v = load_shared16(get + (j & 1) * 512);
        const int token = token0 + 16 * j + get_token;
        if (token < M && f < K) *(uint4*)(out + (size_t)token * K + f) = v;  // K is a multiple of 64
      }
    }
  }
  cluster_sync();  // nobody leaves while the other one may still write to it
}
