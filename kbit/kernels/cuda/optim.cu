// Optimizer step of all tensors of a batch in one launch, for compute capability 8.0 and later (kernels/triton/optim.py
// is the portable version): optim_rules.h has the mathematics, optim_codes.h the codes of 8-bit states, optim_elements.h
// loads and stores.
//
// One warp advances a block of 256 elements, 8 elements a lane: the block's absmax is a warp reduction, and warps never
// wait for each other. The grid is as large as the GPU; its warps walk over the blocks of all tensors side by side.
//
// Settings (macros): ALGO, FLAGS, DECAY, BITS8, SKIP, STOCHASTIC, KAHAN as in rules.py and optim.py; P_KIND, G_KIND 0
// fp32, 1 bf16, 2 fp16; WIDTH elements of a vector access; THREADS, CTAS launch bounds; FAST: approximate quotients
// and roots; LR_KIND: learning rate by value, or read from 1 fp32, 2 fp64; SCALE, CELLS, SIGNED_TOP:
// of the encoding tables.

#include "optim_rules.h"
#include "optim_elements.h"
#include "optim_codes.h"

constexpr u32 EVERYONE = 0xffffffffu;
constexpr u32 INFINITE = 0x7f800000u;

// Columns of a table row, see kbit/optim/batch.py.
enum { P_AT, G_AT, S_AT, A_AT = S_AT + 3, COUNT = A_AT + 3, UNUSED, STEP_AT, REST_AT, SEED, FIRST, BASE, COLUMNS = 16 };

// A tensor as its warp sees it.
struct alignas(16) Area {
  i64 row[COLUMNS];
  Scalars h;
  int first, whole, end;  // numbers of its first block, and of those behind its last whole and its last block
  int pad;
};

struct Shared : Tables {
  Area areas[THREADS / 32];
  Scalars common;
  int last;
};

// Read from shared memory each time, so that no register is held for it.
__device__ __forceinline__ i64 of(const Area& area, int column) {
  return *const_cast<const volatile i64*>(&area.row[column]);
}

__device__ __forceinline__ Scalars scalars_of(const Area& area) {
  const float4* four = reinterpret_cast<const float4*>(&area.h);
  float4 a = four[0], b = four[1], c = four[2], d = four[3];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w, d.x, d.y, d.z, d.w};
}

// What a lane has loaded of a block.
struct Raw {
  u32 p[P_WORDS], g[G_WORDS], rest[KAHAN ? P_WORDS : 1], s[ROOM][S_WORDS], absmax[ROOM];
};

// The larger magnitude; NaN if either is.
__device__ __forceinline__ float larger(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(fabsf(b)));
  return y;
}

__device__ __forceinline__ u32 scramble(u32 x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// The moved parameter under its dtype's rounding. index: of the element in its parameter.
__device__ __forceinline__ float noisy(float moved, i64 index, const Area& area) {
  u32 key = scramble(u32(int(area.h.count)) * 0x9e3779b9u + u32(area.row[SEED]));
  u32 noise = scramble(u32(index) + key + u32(index >> 32) * 0x85ebca6bu) & 0xffffu;
  u32 bits = (__float_as_uint(moved) + noise) & 0xffff0000u;
  return fabsf(moved) < __uint_as_float(INFINITE) ? __uint_as_float(bits) : moved;
}

// Any block, element by element: one that ends early or starts at an odd address, that meets NaN or infinity, or whose
// absmax is so small that subnormal values (which count as zero) would have codes, or very large.
__device__ __noinline__ void careful(Shared& shared, const Area& area, i64 begin) {
  int lane = threadIdx.x % 32;
  float s[ROOM][EACH];
  const Scalars h = area.h;
  u32 top[ROOM] = {};
#pragma unroll 1
  for (int e = 0; e < EACH; e++) {
    i64 at = begin + place(e, lane);
    bool live = at < area.row[COUNT];
    float p = live ? load_one(area.row[P_AT] + at * P_BYTES, P_KIND) : 0.0f;
    float g = live ? load_one(area.row[G_AT] + at * G_BYTES, G_KIND) : 0.0f;
    if (KAHAN && live) p = add(p, load_one(area.row[REST_AT] + at * P_BYTES, P_KIND));
    float old[ROOM] = {}, fresh[ROOM] = {};
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      if (BITS8) {
        u32 code = live ? *reinterpret_cast<const u8*>(area.row[S_AT + k] + at) : 0;
        float absmax = *reinterpret_cast<const float*>(area.row[A_AT + k] + begin / 256 * 4);
        old[k] = live ? mul(shared.values[code][has_sign(k) ? 0 : 1][lane], absmax) : 0.0f;
      } else if (live) {
        old[k] = *reinterpret_cast<const float*>(area.row[S_AT + k] + at * 4);
      }
      fresh[k] = old[k];
    }
    bool keep = !SKIP || g != 0.0f;
    if (DECAY == COUPLED) g = fmaf(p, h.l2, g);
    float direction = advance(p, g, fresh, h);
    float moved = fmaf(direction, -h.rate, mul(p, h.shrink));
    if (QUANTIZED) {
#pragma unroll
      for (int k = 0; k < STATES; k++) keep = keep && fabsf(fresh[k]) < __uint_as_float(INFINITE);
    }
    if (!keep) moved = p;
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      if (!keep) fresh[k] = old[k];
      if (!BITS8) {
        if (live) *reinterpret_cast<float*>(area.row[S_AT + k] + at * 4) = fresh[k];
        continue;
      }
      u32 bits = __float_as_uint(fresh[k]) & 0x7fffffffu;
      if (bits < 0x00800000u) fresh[k] = 0.0f, bits = 0;
      top[k] = max(top[k], bits);
#pragma unroll
      for (int at = 0; at < EACH; at++)
        if (at == e) s[k][at] = fresh[k];
    }
    if (!live) continue;
    if (STOCHASTIC) moved = noisy(moved, at + area.row[BASE], area);
    store_one(area.row[P_AT] + at * P_BYTES, moved);
    if (KAHAN) {
      float rounded = load_one(area.row[P_AT] + at * P_BYTES, P_KIND);
      store_one(area.row[REST_AT] + at * P_BYTES, add(moved, -rounded));
    }
  }
  if (!QUANTIZED) return;
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    u32 absmax = __reduce_max_sync(EVERYONE, top[k]), words[EACH / 4];
    float inverse = absmax ? __frcp_rn(__uint_as_float(absmax)) : 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      float scaled = mul(s[k][e], inverse);
      s[k][e] = s[k][e] > 0.0f && !has_sign(k) ? fmaxf(scaled, SMALLEST) : scaled;
    }
    if (has_sign(k))
      encode_block<true>(shared, s[k], SCALE, words);
    else
      encode_block<false>(shared, s[k], SCALE, words);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      i64 at = begin + place(e, lane);
      if (at < area.row[COUNT]) *reinterpret_cast<u8*>(area.row[S_AT + k] + at) = u8(words[e / 4] >> e % 4 * 8);
    }
    if (lane == 0) *reinterpret_cast<u32*>(area.row[A_AT + k] + begin / 256 * 4) = absmax;
  }
}

// A whole block of aligned tensors, through registers. False, with nothing written, where it needs `careful`.
// ahead: how many blocks further this warp's next one is, 0 if it is another tensor's.
__device__ __forceinline__ bool quick(Shared& shared, const Area& area, u32 block, u32 ahead) {
  u32 lane = threadIdx.x % 32, vector = block * (256 / WIDTH) + lane, next = vector + ahead * (256 / WIDTH);
  Raw raw;
  i64 p_at = of(area, P_AT), g_at = of(area, G_AT);
  load_block<P_BYTES>(raw.p, p_at, vector);
  load_block<G_BYTES>(raw.g, g_at, vector);
  if (KAHAN) load_block<P_BYTES>(raw.rest, of(area, REST_AT), vector);
  if (PREFETCH && ahead) expect_block<P_BYTES>(p_at, next), expect_block<G_BYTES>(g_at, next);
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    i64 s_at = of(area, S_AT + k);
    load_block<S_BYTES>(raw.s[k], s_at, vector);
    if (BITS8) load<4>(raw.absmax + k, of(area, A_AT + k) + u64(block) * 4);
    if (PREFETCH && ahead) expect_block<S_BYTES>(s_at, next);
  }
  u32 lane_at = lane * 4;
  const Scalars h = scalars_of(area);
  float s[ROOM][EACH], top[ROOM] = {};
  u32 out[P_WORDS], rest[KAHAN ? P_WORDS : 1];
  float held[2], left[2];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    float p = element<P_KIND>(raw.p, e), g = element<G_KIND>(raw.g, e);
    if (KAHAN) p = add(p, element<P_KIND>(raw.rest, e));
    float fresh[ROOM], old[ROOM];
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      if (!BITS8)
        old[k] = __uint_as_float(raw.s[k][e % S_WORDS]);
      else if (has_sign(k))
        old[k] = mul(decode<true>(shared, raw.s[k][e / 4 % S_WORDS], e % 4, lane_at), __uint_as_float(raw.absmax[k]));
      else
        old[k] = mul(decode<false>(shared, raw.s[k][e / 4 % S_WORDS], e % 4, lane_at), __uint_as_float(raw.absmax[k]));
      fresh[k] = old[k];
    }
    bool keep = !SKIP || g != 0.0f;
    if (DECAY == COUPLED) g = fmaf(p, h.l2, g);
    float direction = advance(p, g, fresh, h);
    float moved = fmaf(direction, -h.rate, mul(p, h.shrink));
    if (SKIP && !keep) moved = p;
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      if (SKIP && !keep) fresh[k] = old[k];
      s[k][e] = fresh[k];
      if (QUANTIZED) top[k] = larger(top[k], fresh[k]);
    }
    if (STOCHASTIC) moved = noisy(moved, i64(block) * 256 + place(e, lane) + of(area, BASE), area);
    if constexpr (P_KIND == 0) {
      out[e] = __float_as_uint(moved);
    } else {
      held[e % 2] = moved;
      if (e % 2) {
        u32 word = out[e / 2] = pack<P_KIND ? P_KIND : 1>(held[0], held[1]);
        if (KAHAN) {
          left[0] = add(held[0], -element<P_KIND>(&word, 0)), left[1] = add(held[1], -element<P_KIND>(&word, 1));
          rest[e / 2] = pack<P_KIND ? P_KIND : 1>(left[0], left[1]);
        }
      }
    }
  }
  u32 absmax[ROOM] = {};
  if (QUANTIZED) {
    bool fine = true;
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      absmax[k] = __reduce_max_sync(EVERYONE, __float_as_uint(top[k]));
      // Zero, or from 1e-30 to 2**23: not infinite or NaN, and SCALE / absmax is a normal number.
      fine = fine && (absmax[k] == 0 || absmax[k] - 0x0da24260u < 0x4b000000u - 0x0da24260u);
    }
    if (!fine) return false;
  }
  store_block<P_BYTES>(out, of(area, P_AT), vector);
  if (KAHAN) store_block<P_BYTES>(rest, of(area, REST_AT), vector);
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    u32 words[S_WORDS];
    if (BITS8) {
      if (has_sign(k))
        encode_block<true>(shared, s[k], inverse_of(absmax[k]), words);
      else
        encode_block<false>(shared, s[k], inverse_of(absmax[k]), words);
      if (lane == 0) store<4>(absmax + k, of(area, A_AT + k) + u64(block) * 4);
    } else {
#pragma unroll
      for (int e = 0; e < EACH; e++) words[e % S_WORDS] = __float_as_uint(s[k][e]);
    }
    store_block<S_BYTES>(words, of(area, S_AT + k), vector);
  }
  return true;
}

// Put the tensor that block `number` belongs to into `area`. first: a row at or before it. -> its row.
__device__ __noinline__ int find(Shared& shared, Area& area, const i64* table, int rows, int blocks, int number,
                                 int first, const Hyper& hyper, const void* lr) {
  int lane = threadIdx.x % 32, high = rows;  // table[first].FIRST <= number < table[high].FIRST
  while (high - first > 1) {
    int middle = (first + high) / 2;
    if (table[i64(middle) * COLUMNS + FIRST] <= number) first = middle;
    else high = middle;
  }
  i64 mine = lane < COLUMNS ? table[i64(first) * COLUMNS + lane] : 0;
  bool pointer = lane < A_AT || lane == REST_AT;
  int aligned = __all_sync(EVERYONE, !pointer || mine % 16 == 0);
  __syncwarp();
  if (lane < COLUMNS) area.row[lane] = mine;
  i64 step_at = __shfl_sync(EVERYONE, mine, STEP_AT), mine_first = __shfl_sync(EVERYONE, mine, FIRST);
  float count = *reinterpret_cast<const float*>(step_at) + 1.0f;
  if (lane == 0) {
    area.first = int(mine_first);
    area.end = first + 1 < rows ? int(table[i64(first + 1) * COLUMNS + FIRST]) : blocks;
    area.whole = aligned ? area.first + int(area.row[COUNT] / 256) : area.first;
    if (count == shared.common.count) area.h = shared.common;
    else make_scalars(area.h, hyper, lr, count);
  }
  __syncwarp();
  return first;
}

// table: [rows, 16]; blocks: of all rows together; lookup: 256 signed values, 256 unsigned ones, signed and unsigned
// cells; counted: the table whose `counted_rows` step counts go up by one once the whole grid is done; tickets: 0.
extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
optim(const i64* table, int rows, int blocks, const u32* lookup, const __grid_constant__ Hyper hyper, const void* lr,
      const i64* counted, int counted_rows, u32* tickets) {
  extern __shared__ __align__(1024) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  int thread = threadIdx.x, warp = thread / 32;
#if BITS8
  for (int i = thread; i < 256 * 64; i += THREADS)
    (&shared.values[0][0][0])[i] = __uint_as_float(lookup[(i / 32 % 2) * 256 + i / 64]);
  for (int i = thread; i < 2 * CELLS; i += THREADS) (&shared.cells[0][0])[i] = lookup[512 + i];
#endif
#if __CUDA_ARCH__ >= 900
  // Everything above may overlap with the kernel before this one on the stream.
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (thread == 0 && rows) {
    float count = *reinterpret_cast<const float*>(table[STEP_AT]) + 1.0f;
    make_scalars(shared.common, hyper, lr, count);
  }
  __syncthreads();
  int stride = gridDim.x * (THREADS / 32), number = blockIdx.x * (THREADS / 32) + warp;
  Area& area = shared.areas[warp];
  if (thread % 32 == 0) area.end = 0;
  __syncwarp();
  for (int row = -1; number < blocks; number += stride) {
    if (number >= area.end) row = find(shared, area, table, rows, blocks, number, row + 1, hyper, lr);
    u32 block = number - area.first, ahead = number + stride < area.end ? stride : 0;
    if (number >= area.whole || !quick(shared, area, block, ahead)) careful(shared, area, i64(block) * 256);
  }
  // The last thread block to finish counts the step: everyone has read the old counts by then.
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    shared.last = atomicAdd(tickets, 1u) == gridDim.x - 1;
    if (shared.last) *tickets = 0;
  }
  __syncthreads();
  if (!shared.last) return;
  for (int i = thread; i < counted_rows; i += THREADS)
    *reinterpret_cast<float*>(counted[i64(i) * COLUMNS + STEP_AT]) += 1.0f;
}
