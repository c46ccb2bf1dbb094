// LLM.int8() on Hopper: out[M, N] = (codes W^T) * rows * absmax + outlier columns in 16 bits + bias, x in bf16 or fp16.
//
// codes[M, K] and rows[M] are the quantized activations, flags[K] marks the columns that hold an outlier. Two consumer
// warpgroups multiply a tile of 128 tokens by BN out features in s8 x s8 -> s32, both operands from shared memory, while one
// warp keeps STAGES slices of K in flight with the bulk tensor copy engine. Blocks are persistent: the copies of the next
// tile run under the epilogue of this one. CLUSTER = 2 blocks, neighbours along M, load half of the weights each and
// share them.
//
// Outlier columns: three more warps read x, codes and W at 16 marked columns at a time, and leave the rest
// x - code * rows in 16 bits, and the codes of W (exact in 16 bits), in shared memory. The scaled sums are already fp32 in the
// accumulators' registers then, and the same tensor core adds rest W^T to them: the int8 share of an outlier column is
// taken back and the column counts as it is. At many tokens gather_columns.cu has put these columns side by side (rest,
// sub).
//
// With more than `limit` outlier columns nothing is gained by int8: then all columns are multiplied in 16 bits, as wide.h does it. The blocks
// count the columns while their first tiles arrive.
//
// Where tiles are fewer than multiprocessors, K is split among the SPLIT blocks of a cluster: their parts, scaled to fp32, meet in
// distributed shared memory and are added in a fixed order; results repeat bit for bit.
//
// Compile-time settings: FP16, BN (a multiple of 32 up to 256), STAGES, CLUSTER, SPLIT (1 where CLUSTER is 2) and
// CAPACITY. wgmma_s8.h is generated for BN. For wide.h, BITS (8), NT and WIDE_STAGES.

#include "hopper.h"
#include "wgmma_s8.h"
#include "wide.h"

constexpr int BM = 128, BK = 128;
constexpr int CONSUMERS = 256, THREADS = 384, GATHERERS = 96;
constexpr int A_BYTES = BM * BK, W_BYTES = BN * BK, STAGE = A_BYTES + W_BYTES;
constexpr int OC = 16;                             // outlier columns at a time
constexpr int REST_OFFSET = STAGES * STAGE;        // [2 halves of OC][BM][8] in 16 bits
constexpr int SUB_OFFSET = REST_OFFSET + BM * OC * 2;  // [2][BN][8]
constexpr int PITCH = 80;                          // bytes a row of a warp's output buffer: 32 values, padded
constexpr int STORE_OFFSET = SUB_OFFSET + BN * OC * 2;
constexpr int LIST_OFFSET = STORE_OFFSET + 8 * 16 * PITCH;  // marked columns in order
constexpr int SCALE_OFFSET = LIST_OFFSET + CAPACITY * 2;  // for each warpgroup: scales, then biases of the tile's columns
constexpr int MASK_OFFSET = SCALE_OFFSET + 2 * 2 * BN * 4;
constexpr int MASK_BYTES = 4096;                   // one bit a column: K up to 32768
constexpr int BAR_OFFSET = MASK_OFFSET + MASK_BYTES;
constexpr int ACC = BN / 2;                        // accumulators a lane
constexpr float STEP = 0.007874015748031496f;      // 1 / 127
constexpr int PART_PITCH = BN + 8;                 // floats a row of a part, over the stages

constexpr int BLOCKS = CLUSTER * SPLIT > 1 ? CLUSTER * SPLIT : 2;  // a cluster; of wide.h's pairs in any case

static_assert(CLUSTER == 1 || SPLIT == 1, "a cluster shares weights or splits K");
static_assert(SPLIT == 1 || BM * PART_PITCH * 4 <= STAGES * STAGE, "a part fits where the stages were");
static_assert(BLOCKS % 2 == 0, "pairs share inputs when all columns are multiplied in 16 bits");

struct Unit { int token0, row0; };

// workers: clusters at work in int8. workspace, wide_flags, launch, wide_blocks, shared_tiles: of wide.h.
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(BLOCKS, 1, 1)
llm_int8(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap wide_w,
         const __grid_constant__ TensorMap wide_x, const u16* __restrict__ x, const signed char* __restrict__ codes,
         const signed char* __restrict__ weight, const float* __restrict__ rows, const float* __restrict__ absmax,
         const u16* __restrict__ bias, const u8* __restrict__ flags, const u16* __restrict__ rest, const u16* __restrict__ sub,
         u16* __restrict__ out, float4* workspace, u64* wide_flags, u64 launch, int M, int N, int K, int stride_x,
         int stride_codes, int group, int limit, int workers, int wide_blocks, int shared_tiles) {
  extern __shared__ u8 raw_shared[];
  const u32 base = (shared_address(raw_shared) + 1023) & ~1023u;
  const u32 full = base + BAR_OFFSET, empty = full + 8 * STAGES;
  const u32 rest_full = empty + 8 * STAGES, rest_empty = rest_full + 8, note = rest_full + 16;
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread >> 5, 0), lane = thread & 31;
  const u32 cluster = CLUSTER * SPLIT > 1 ? cluster_rank() : 0;
  const u32 rank = CLUSTER > 1 ? cluster : 0, split = SPLIT > 1 ? cluster : 0;

  const int tiles_m = (M + BM * CLUSTER - 1) / (BM * CLUSTER), tiles_n = (N + BN - 1) / BN;  // per cluster
  const int units = tiles_m * tiles_n;
  const int all_steps = (K + BK - 1) / BK, share = (all_steps + SPLIT - 1) / SPLIT;
  const int begin_step = min(all_steps, (int)split * share);
  const int steps = min(share, all_steps - begin_step);
  // Tiles of tokens in groups, so that clusters at work at one time share what they read.
  auto unit_at = [&](int u) {
    Unit unit;
    const int first = u / (group * tiles_n) * group, inner = u % (group * tiles_n), height = min(group, tiles_m - first);
    unit.token0 = ((first + inner % height) * CLUSTER + rank) * BM;
    unit.row0 = inner / height * BN;
    return unit;
  };
  // A split block has one tile, whose part takes the place of the stages.
  const int first_unit = blockIdx.x / (CLUSTER * SPLIT), stride_unit = workers;

  if (thread == CONSUMERS) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2 * CLUSTER);
    }
    barrier_init(rest_full, GATHERERS);
    barrier_init(rest_empty, 2);
    asm volatile("st.shared.u32 [%0], 0;" ::"r"(note) : "memory");
    barriers_are_ready();
  }
  if (CLUSTER * SPLIT > 1) cluster_sync();
  else __syncthreads();
  wait_for_previous_kernel();

  auto copy_stage = [&](const Unit& unit, int step, int slot) {
    const int column = (begin_step + step) * BK;
    const u32 bar = full + 8 * slot, to = base + slot * STAGE;
    barrier_expect(bar, STAGE);
    copy_tile(to, &map_a, column, unit.token0, bar);
    if (CLUSTER > 1)
      copy_tile_to<CLUSTER>(to + A_BYTES + rank * (W_BYTES / CLUSTER), &map_w, column, unit.row0 + rank * (BN / CLUSTER), bar);
    else
      copy_tile(to + A_BYTES, &map_w, column, unit.row0, bar);
  };
  // The first stages are under way while everybody counts the outlier columns; should these be too many, nobody uses them. Where one row
  // has said that they are, no more than one stage is fetched in vain.
  const bool idle = first_unit >= units || first_unit >= workers;  // started for the 16-bit product alone
  const int early = idle ? 0 : min(STAGES, steps);
  const bool over = flags && *(const u32*)(flags + K);
  int copied = min(1, early);
  if (thread == CONSUMERS) {
    if (copied) copy_stage(unit_at(first_unit), 0, 0);
    for (; !over && copied < early; copied++) copy_stage(unit_at(first_unit), copied, copied);
  }
  int outliers = 0;
  if (flags) {
    for (int i = thread; i < K / 16; i += THREADS) {
      const uint4 f = *(const uint4*)(flags + 16 * i);
      const u32 word[4] = {f.x, f.y, f.z, f.w};
      u32 bits = 0;
#pragma unroll
      for (int j = 0; j < 4; j++)  // bytes are 0 or 1: gather their lowest bits
        bits |= ((word[j] * 0x10204080u) >> 28) << 4 * j;
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(base + MASK_OFFSET + 2 * i), "h"((u16)bits) : "memory");
      outliers += __popc(bits);
    }
    if (thread == 0 && K % 32) asm volatile("st.shared.u16 [%0], %1;" ::"r"(base + MASK_OFFSET + K / 16 * 2), "h"((u16)0) : "memory");
    if (outliers) asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(note), "r"(outliers) : "memory");
    __syncthreads();
    outliers = load_shared(note);
    if (over) outliers = limit + 1;
  }
  if (outliers > limit) {
    if (thread == CONSUMERS) {  // shared memory gets another use: copies have to arrive, barriers to end
      for (int step = 0; step < copied; step++) barrier_wait(full + 8 * step, 0);
      for (u32 bar = full; bar < note; bar += 8) barrier_end(bar);
    }
    __syncthreads();
    if (blockIdx.x < wide_blocks)
      wide::multiply<BLOCKS, false>(base, wide_w, wide_x, blockIdx.x, wide_blocks, absmax, nullptr, nullptr, bias, out, workspace, wide_flags, launch,
                                    M, N, K, 0, shared_tiles);
    return;
  }
  if (idle) return;

  if (warp >= CONSUMERS / 32) {
    if (warp == CONSUMERS / 32) {
      if (lane == 0) {
        int slot = early % STAGES, turn = early;
        u32 phase = early == STAGES;
        for (int u = first_unit; u < units; u += stride_unit) {
          const Unit unit = unit_at(u);
          for (int step = u == first_unit ? early : 0; step < steps; step++) {
            if (turn >= STAGES) barrier_wait(empty + 8 * slot, phase ^ 1);
            turn++;
            copy_stage(unit, step, slot);
            if (++slot == STAGES) slot = 0, phase ^= 1;
          }
        }
      }
    } else if (outliers && split == 0) {
      const int me = thread - CONSUMERS - 32;
      if (me < 32) {  // the marked columns, in order
        const int words = (K + 31) / 32;
        int total = 0;
        for (int at = 0; at < words; at += 32) {
          u32 bits = at + lane < words ? load_shared(base + MASK_OFFSET + 4 * (at + lane)) : 0;
          int place = __popc(bits);
          const int own = place;
#pragma unroll
          for (int d = 1; d < 32; d *= 2) {
            const int v = __shfl_up_sync(~0u, place, d);
            if (lane >= d) place += v;
          }
          const int sum = __shfl_sync(~0u, place, 31);
          place += total - own;
          while (bits) {
            const int bit = __ffs(bits) - 1;
            bits &= bits - 1;
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(base + LIST_OFFSET + 2 * place), "h"((u16)(32 * (at + lane) + bit)) : "memory");
            place++;
          }
          total += sum;
        }
      }
      sync_some<1, GATHERERS>();
      int turn = 0;
      for (int u = first_unit; u < units; u += stride_unit) {
        const Unit unit = unit_at(u);
        for (int begin = 0; begin < outliers; begin += OC) {
          if (turn) barrier_wait(rest_empty, (turn - 1) & 1);
          turn++;
          const int here = min(OC, outliers - begin);
          const u32 list = base + LIST_OFFSET + 2 * begin;
          if (rest) {  // they lie side by side already
            constexpr int ITEMS = (2 * (BM + BN) + GATHERERS - 1) / GATHERERS;
            uint4 v[ITEMS];
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
              const int item = me + i * GATHERERS, row = item >> 1;
              const bool of_x = row < BM;
              const int at = of_x ? min(unit.token0 + row, M - 1) : min(unit.row0 + row - BM, N - 1);
              if (row < BM + BN) v[i] = *(const uint4*)((of_x ? rest : sub) + (size_t)at * CAPACITY + begin + (item & 1) * 8);
            }
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
              const int item = me + i * GATHERERS, half = item & 1, row = item >> 1;
              const bool of_x = row < BM;
              const u32 to = of_x ? REST_OFFSET + (half * BM + row) * 16 : SUB_OFFSET + (half * BN + row - BM) * 16;
              if (row < BM + BN) store16(base + to, v[i].x, v[i].y, v[i].z, v[i].w);
            }
          } else {
#pragma unroll 1
            for (int half = 0; half < 2; half++) {
              const int wanted = here - 8 * half;
              u32 column[8];
#pragma unroll
              for (int j = 0; j < 8; j++) {
                u16 c = 0;
                if (j < wanted) asm volatile("ld.shared.u16 %0, [%1];" : "=h"(c) : "r"(list + 2 * (8 * half + j)));
                column[j] = c;
              }
              // A thread's loads are all under way before the first value is used: latency is what costs here.
              constexpr int OF_W = (BN + GATHERERS - 1) / GATHERERS, OF_X = (BM + GATHERERS - 1) / GATHERERS;
              signed char code[OF_W][8];
#pragma unroll
              for (int i = 0; i < OF_W; i++) {
                const signed char* const from = weight + (size_t)min(unit.row0 + me + i * GATHERERS, N - 1) * K;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                  code[i][j] = 0;
                  if (j < wanted) code[i][j] = from[column[j]];
                }
              }
#pragma unroll
              for (int i = 0; i < OF_W; i++) {
                const int row = me + i * GATHERERS;
                u32 v[4];
#pragma unroll
                for (int j = 0; j < 4; j++) v[j] = to_halves((float)code[i][2 * j], (float)code[i][2 * j + 1]);
                if (row < BN) store16(base + SUB_OFFSET + (half * BN + row) * 16, v[0], v[1], v[2], v[3]);
              }
              u16 raw[OF_X][8];
              signed char own[OF_X][8];
              float scale[OF_X];
#pragma unroll
              for (int i = 0; i < OF_X; i++) {
                const int m = min(unit.token0 + me + i * GATHERERS, M - 1);
                scale[i] = rows[m] * STEP;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                  raw[i][j] = 0;
                  own[i][j] = 0;
                  if (j < wanted) {
                    raw[i][j] = x[(size_t)m * stride_x + column[j]];
                    own[i][j] = codes[(size_t)m * stride_codes + column[j]];
                  }
                }
              }
#pragma unroll
              for (int i = 0; i < OF_X; i++) {
                const int row = me + i * GATHERERS;
                float value[8];
#pragma unroll
                for (int j = 0; j < 8; j++)
                  value[j] = j < wanted ? __fsub_rn(from_half(raw[i][j]), __fmul_rn((float)own[i][j], scale[i])) : 0.f;
                if (row < BM)
                  store16(base + REST_OFFSET + (half * BM + row) * 16, to_halves(value[0], value[1]), to_halves(value[2], value[3]),
                          to_halves(value[4], value[5]), to_halves(value[6], value[7]));
              }
            }
          }
          asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
          barrier_arrive(rest_full);
        }
      }
    }
  } else {
    const int wg = warp >> 2, g = lane >> 2, t = lane & 3;
    const int local0 = wg * 64 + (warp & 3) * 16 + g;  // this lane's tokens: local0 and local0 + 8
    int slot = 0, turn = 0;
    u32 phase = 0;
    auto release = [&](int slot) {
      if ((thread & 127) < CLUSTER) {
        if (CLUSTER > 1) barrier_arrive_at(empty + 8 * slot, thread & 127);
        else barrier_arrive(empty + 8 * slot);
      }
    };
    for (int u = first_unit; u < units; u += stride_unit) {
      const Unit unit = unit_at(u);
      // Asked for now, needed after the products.
      const int m0 = unit.token0 + local0, m1 = m0 + 8;
      const float scale0 = m0 < M ? rows[m0] * STEP : 0.f, scale1 = m1 < M ? rows[m1] * STEP : 0.f;
      float column_scale[2], column_bias[2];
      if (SPLIT == 1) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int n = min(unit.row0 + min((thread & 127) + 128 * h, BN - 1), N - 1);
          column_scale[h] = absmax[n] * STEP;
          column_bias[h] = bias ? from_half(bias[n]) : 0.f;
        }
      }
      int acc[ACC];
      int before = -1;
      for (int step = 0; step < steps; step++) {
        barrier_wait(full + 8 * slot, phase);
        // 128-byte swizzled, K-major: 8 rows are 1024 bytes; 32 codes further in K are 32 bytes further.
        const u32 a = base + slot * STAGE + wg * (64 * BK), w = base + slot * STAGE + A_BYTES;
        const u64 kind = (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
        const u64 da = kind | ((a & 0x3ffff) >> 4), dw = kind | ((w & 0x3ffff) >> 4);
#pragma unroll
        for (int i = 0; i < ACC; i++) asm volatile("" : "+r"(acc[i])::"memory");
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < BK / 32; i++) wgmma_s8(acc, da + 2 * i, dw + 2 * i, step > 0 || i > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (before >= 0) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          release(before);
        }
        before = slot;
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < ACC; i++) asm volatile("" : "+r"(acc[i])::"memory");
      if (before >= 0) release(before);
      // In place: the registers of the int32 sums become those of the fp32 ones.
#pragma unroll
      for (int i = 0; i < ACC; i++)
        asm volatile("{\n .reg .f32 v;\n cvt.rn.f32.s32 v, %0;\n mul.rn.f32 v, v, %1;\n mov.b32 %0, v;\n}" : "+r"(acc[i]) : "f"(i & 2 ? scale1 : scale0));
      if (split == 0) {
        for (int begin_c = 0; begin_c < outliers; begin_c += OC) {
          barrier_wait(rest_full, turn & 1);
          turn++;
          // No swizzle: 8 rows of 16 bytes are 128 bytes, the next 8 columns are a whole operand further.
          const u32 a = base + REST_OFFSET + wg * 1024, w = base + SUB_OFFSET;
          const u64 da = (u64)((a & 0x3ffff) >> 4) | (u64)(BM) << 16 | (u64)8 << 32;
          const u64 dw = (u64)((w & 0x3ffff) >> 4) | (u64)(BN) << 16 | (u64)8 << 32;
#pragma unroll
          for (int i = 0; i < ACC; i++) asm volatile("" : "+r"(acc[i])::"memory");
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
          wgmma_half(acc, da, dw, 1);
          asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
          for (int i = 0; i < ACC; i++) asm volatile("" : "+r"(acc[i])::"memory");
          // The last ones are given back after the epilogue: what the next tile needs is then fetched under its products,
          // instead of holding up the stores of this one.
          if (begin_c + OC < outliers && (thread & 127) == 0) barrier_arrive(rest_empty);
        }
      }
      if (SPLIT > 1) {  // the part goes where the stages were, once no warpgroup reads those
        sync_some<2, CONSUMERS>();
#pragma unroll
        for (int i = 0; i < ACC; i += 2) {
          const int row = local0 + (i & 2) * 4, column = (i >> 2) * 8 + 2 * t;
          asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(base + (row * PART_PITCH + column) * 4), "r"(steps > 0 ? acc[i] : 0), "r"(steps > 0 ? acc[i + 1] : 0) : "memory");
        }
        break;
      }

      const u32 table = base + SCALE_OFFSET + wg * (2 * BN * 4);
      if (wg == 0) sync_some<3, 128>();  // every warp has read the last tile's
      else sync_some<4, 128>();
#pragma unroll
      for (int h = 0; h < 2; h++)
        if ((thread & 127) + 128 * h < BN) {
          const u32 at = table + ((thread & 127) + 128 * h) * 4;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(column_scale[h]) : "memory");
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + BN * 4), "f"(column_bias[h]) : "memory");
        }
      if (wg == 0) sync_some<3, 128>();
      else sync_some<4, 128>();

      // 32 columns at a time through the warp's own buffer, so that rows leave in pieces of 64 bytes.
      const u32 buffer = base + STORE_OFFSET + warp * 16 * PITCH;
      const bool even = (N & 7) == 0;
#pragma unroll
      for (int pass = 0; pass < BN / 32; pass++) {
#pragma unroll
        for (int b = 0; b < 4; b++) {
          const int i = (pass * 4 + b) * 4;
          const u32 at = table + (pass * 32 + b * 8 + 2 * t) * 4;
          float c0, c1, b0, b1;
          asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(c0), "=f"(c1) : "r"(at));
          asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(b0), "=f"(b1) : "r"(at + BN * 4));
          const u32 low = to_halves(__fadd_rn(__int_as_float(acc[i]) * c0, b0), __fadd_rn(__int_as_float(acc[i + 1]) * c1, b1));
          const u32 high = to_halves(__fadd_rn(__int_as_float(acc[i + 2]) * c0, b0), __fadd_rn(__int_as_float(acc[i + 3]) * c1, b1));
          asm volatile("st.shared.u32 [%0], %1;" ::"r"(buffer + g * PITCH + b * 16 + t * 4), "r"(low) : "memory");
          asm volatile("st.shared.u32 [%0], %1;" ::"r"(buffer + (g + 8) * PITCH + b * 16 + t * 4), "r"(high) : "memory");
        }
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int row = h * 8 + (lane >> 2), m = unit.token0 + wg * 64 + (warp & 3) * 16 + row;
          const int n = unit.row0 + pass * 32 + (lane & 3) * 8;
          u32 v[4];
          asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                       : "r"(buffer + row * PITCH + (lane & 3) * 16));
          if (m < M && n < N) {
            u16* const to = out + (size_t)m * N + n;
            if (even) {
              *(uint4*)to = make_uint4(v[0], v[1], v[2], v[3]);
            } else {
#pragma unroll
              for (int j = 0; j < 8; j++)
                if (n + j < N) to[j] = (u16)(v[j >> 1] >> (j & 1) * 16);
            }
          }
        }
        __syncwarp();
      }
      if (outliers > 0 && (thread & 127) == 0) barrier_arrive(rest_empty);
    }
  }
  __syncwarp();
  if (CLUSTER > 1) cluster_sync();  // nobody leaves while the other block may still arrive at its barriers
  if (SPLIT > 1) {
    cluster_sync();
    const Unit unit = unit_at(first_unit);
    constexpr int HEIGHT = (BM + SPLIT - 1) / SPLIT, PIECES = BN / 4;
    for (int item = thread; item < HEIGHT * PIECES; item += THREADS) {
      const int row = split * HEIGHT + item / PIECES, m = unit.token0 + row, n = unit.row0 + item % PIECES * 4;
      if (row >= BM || m >= M || n >= N) continue;
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int r = 0; r < SPLIT; r++) {
        const float4 v = load_remote(base + (row * PART_PITCH + item % PIECES * 4) * 4, r);
        sum[0] += v.x; sum[1] += v.y; sum[2] += v.z; sum[3] += v.w;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = min(n + i, N - 1);
        sum[i] = __fadd_rn(sum[i] * (absmax[at] * STEP), bias ? from_half(bias[at]) : 0.f);
      }
      const u32 low = to_halves(sum[0], sum[1]), high = to_halves(sum[2], sum[3]);
      u16* const to = out + (size_t)m * N + n;
      if ((N & 3) == 0) {
        *(uint2*)to = make_uint2(low, high);
      } else {
        to[0] = (u16)low;
        if (n + 1 < N) to[1] = (u16)(low >> 16);
        if (n + 2 < N) to[2] = (u16)high;
        if (n + 3 < N) to[3] = (u16)(high >> 16);
      }
    }
    cluster_sync();  // nobody leaves while its part is read
  }
}
