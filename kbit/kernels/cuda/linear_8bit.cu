// out[M, N] = x[M, K] W[N, K]^T * absmax / 127 + bias on Hopper at few tokens, W in int8, x in bf16 or fp16.
//
// As in linear_4bit.cu: W x^T with the weight as the left operand, decoded in registers; a producer warp keeps STAGES
// tiles of codes and inputs in flight with the bulk tensor copy engine; WR x WK consumer warpgroups (WR along N, 64 rows each;
// WK take turns along K) decode 64 columns while the tensor cores multiply the 64 before; CLUSTER thread blocks may split
// K, and parts meet in distributed shared memory in a fixed order. A code is exact in 16 bits, so it enters the product
// as it is, and the scale of its row is applied to the fp32 sum.
//
// WEIGHTS > 1: several weights of one K multiply the same x, as in linear_4bit.cu.
//
// Compile-time settings: FP16, WEIGHTS, NT (tokens a tile), WR, WK, STAGES, CLUSTER, CTAS (blocks a multiprocessor). wgmma.h is
// generated for NT.

#include "hopper.h"
#include "epilogue.h"
#include "weights.h"
#include "wgmma.h"

constexpr int KS = 128;                            // K a stage: one 128-byte row of codes
constexpr int ROWS = 64 * WR;                      // rows of W a tile
constexpr int GROUPS = WR * WK;                    // consumer warpgroups
constexpr int THREADS = 128 * GROUPS + 32;
constexpr int W_BYTES = ROWS * KS;
constexpr int X_BYTES = NT * 128;                  // one 64-wide slice of x
constexpr int STAGE = W_BYTES + 2 * X_BYTES;
constexpr int PITCH = ROWS + 4;                    // floats a token in the epilogue's buffer
constexpr int PARTS = WK * NT * PITCH * 4;
constexpr int BAR_OFFSET = STAGES * STAGE > PARTS ? STAGES * STAGE : (PARTS + 15) / 16 * 16;
constexpr int ACC = NT / 2;                        // accumulators a lane

static_assert(STAGES % WK == 0 && STAGES >= 2 * WK, "a stage belongs to one warpgroup along K");

extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
#if CLUSTER > 1
    __cluster_dims__(1, 1, CLUSTER)
#endif
#if WEIGHTS > 1
linear_8bit(const __grid_constant__ Weights weights, const __grid_constant__ TensorMap map_x, const __grid_constant__ Outs outs, int M, int K) {
  const int mine = weight_of(weights, blockIdx.x);
  const Weight& weight = weights.weight[mine];
  const TensorMap& map_w = weight.map_w;
  const float* const __restrict__ absmax = (const float*)weight.absmax;
  const u16* const __restrict__ bias = weight.bias;
  u16* const __restrict__ out = outs.out[mine];
  const int N = weight.n, row0 = ((int)blockIdx.x - weight.first_tile) * ROWS;
#else
linear_8bit(const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_x, const float* __restrict__ absmax,
            const u16* __restrict__ bias, u16* __restrict__ out, int M, int N, int K) {
  const int row0 = blockIdx.x * ROWS;
#endif
  extern __shared__ u8 raw_shared[];
  const u32 base = (shared_address(raw_shared) + 1023) & ~1023u;
  const u32 full = base + BAR_OFFSET, empty = full + 8 * STAGES;
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread >> 5, 0), lane = thread & 31;
  const int token0 = blockIdx.y * NT;
  const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int all = (K + KS - 1) / KS, share = (all + CLUSTER - 1) / CLUSTER;
  const int begin = min(all, (int)rank * share), steps = min(share, all - begin);

  auto fetch = [&](int step, int slot) {
    const int k = (begin + step) * KS;
    const u32 bar = full + 8 * slot, to = base + slot * STAGE;
    barrier_expect(bar, STAGE);
    copy_tile(to, &map_w, k, row0, bar);
    copy_tile(to + W_BYTES, &map_x, k, token0, bar);
    copy_tile(to + W_BYTES + X_BYTES, &map_x, k + 64, token0, bar);
  };
  if (thread == 128 * GROUPS) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * WR);
    }
    barriers_are_ready();
  }
  // Up to here nothing was read that an earlier kernel may have written, and that one may still run.
  wait_for_previous_kernel();
  if (thread == 128 * GROUPS)
    for (int step = 0; step < STAGES && step < steps; step++) fetch(step, step);
  __syncthreads();

  const int group = warp >> 2, g = lane >> 2, t = lane & 3;
  const int group_k = group % WK, group_r = group / WK;
  const int local0 = group_r * 64 + (warp & 3) * 16 + g;  // this lane's rows: local0 and local0 + 8

  if (warp >= 4 * GROUPS) {
    if (thread == 128 * GROUPS)
      for (int step = STAGES, slot = 0, phase = 0; step < steps; step++) {
        barrier_wait(empty + 8 * slot, phase);
        fetch(step, slot);
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
  } else {
    float acc[ACC];
#pragma unroll
    for (int i = 0; i < ACC; i++) acc[i] = 0.f;
    u32 a[2][16];

    // Codes of 64 rows x 64 columns -> fragments. The 16-byte pieces of row r are swizzled by r mod 8, so that the eight
    // rows a load touches lie in different banks.
    auto decode = [&](u32 (&to)[16], int slot, int half) {
      const u32 row = base + slot * STAGE + local0 * KS + 2 * t;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const u32 at = ((4 * half + (i >> 1)) ^ (local0 & 7)) * 16 + 8 * (i & 1);
        to[2 * i] = widen_codes<0x4140>(load_pair(row + at));
        to[2 * i + 1] = widen_codes<0x4140>(load_pair(row + 8 * KS + at));
      }
    };
    auto multiply = [&](u32 (&from)[16], int slot, int half) {
      // 128-byte swizzled K-major x: 8 tokens are 1024 bytes; 16 elements further in K are 32 bytes further.
      const u32 x = base + slot * STAGE + W_BYTES + half * X_BYTES;
      const u64 descriptor = (u64)((x & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < 4; i++) wgmma(acc, from + 4 * i, descriptor + 2 * i, 1);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    };
    auto finish = [&]() {  // the product has left the tensor cores
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < ACC; i++) asm volatile("" : "+f"(acc[i])::"memory");
    };
    int slot = group_k;
    u32 phase = 0;
    if (group_k < steps) {
      barrier_wait(full + 8 * slot, phase);
      decode(a[0], slot, 0);
    }
    for (int step = group_k; step < steps; step += WK) {
      // While the tensor cores multiply one half of a stage, the next one is decoded.
      multiply(a[0], slot, 0);
      decode(a[1], slot, 1);
      finish();
      const int done = slot;
      multiply(a[1], done, 1);
      if (step + WK < steps) {
        slot += WK;
        if (slot >= STAGES) slot -= STAGES, phase ^= 1;
        barrier_wait(full + 8 * slot, phase);
        decode(a[0], slot, 0);
      }
      finish();
      if (lane == 0) barrier_arrive(empty + 8 * done);
    }

    // Parts meet in shared memory, [WK][NT][PITCH] floats over the stages, once no consumer needs those.
    sync_some<1, 128 * GROUPS>();
#pragma unroll
    for (int i = 0; i < ACC; i++) {
      const int token = (i >> 2) * 8 + 2 * t + (i & 1), row = local0 + (i & 2) * 4;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(base + ((group_k * NT + token) * PITCH + row) * 4), "f"(acc[i]) : "memory");
    }
  }
  store_sums<NT, ROWS, PITCH, WK, THREADS, CLUSTER>(base, rank, thread, token0, row0, M, N, out, [&](float v, int n) {
    const int at = min(n, N - 1);
    return __fadd_rn(v * (absmax[at] * 0.007874015748031496f), bias ? from_half(bias[at]) : 0.f);
  });
}
