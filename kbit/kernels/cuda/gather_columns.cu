// Many outlier columns of LLM.int8(): what llm_int8.cu adds for them, side by side instead of a row's length apart.
//
// rest[M, CAPACITY] = x - code * scale at the marked columns, in order, and sub[N, CAPACITY] = codes of W there, both in 16
// bits, zeros up to a multiple of 16 columns. With more than CAPACITY of them, nothing: nobody reads them then. A block takes ROWS rows
// of x or rows_w of W.
//
// Compile-time settings: FP16, CAPACITY (columns, and threads a block), ROWS.

#include "hopper.h"

extern "C" __global__ void __launch_bounds__(CAPACITY)
gather_columns(const u16* __restrict__ x, const signed char* __restrict__ codes, const signed char* __restrict__ weight,
               const float* __restrict__ rows, const u8* __restrict__ flags, u16* __restrict__ rest, u16* __restrict__ sub,
               int M, int N, int K, int stride_x, int rows_w) {
  __shared__ u32 sums[CAPACITY / 32];
  __shared__ int list[CAPACITY];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  wait_for_previous_kernel();

  // A thread looks at neighbouring pieces of 16 flags, so that the list is in the order of the columns.
  const int pieces = K / 16, share = (pieces + CAPACITY - 1) / CAPACITY, first = thread * share;
  u32 own = 0;
  for (int i = first; i < min(first + share, pieces); i++) {
    const uint4 f = ((const uint4*)flags)[i];  // bytes are 0 or 1
    own += __popc(f.x) + __popc(f.y) + __popc(f.z) + __popc(f.w);
  }
  u32 place = own;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const u32 v = __shfl_up_sync(~0u, place, d);
    if (lane >= d) place += v;
  }
  if (lane == 31) sums[warp] = place;
  __syncthreads();
  u32 count = 0;
  place -= own;
#pragma unroll
  for (int w = 0; w < CAPACITY / 32; w++) {
    if (w < warp) place += sums[w];
    count += sums[w];
  }
  const int blocks_x = (M + ROWS - 1) / ROWS;
  const bool of_x = blockIdx.x < blocks_x;
  const int row0 = of_x ? blockIdx.x * ROWS : (blockIdx.x - blocks_x) * rows_w;
  const int height = of_x ? min(ROWS, M - row0) : min(rows_w, N - row0);
  if (count == 0 || count > CAPACITY || *(const u32*)(flags + K)) return;
  for (int i = first; own && i < min(first + share, pieces); i++) {
    const uint4 f = ((const uint4*)flags)[i];
    const u32 word[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
    for (int j = 0; j < 16; j++)
      if (word[j / 4] >> j % 4 * 8 & 1) list[place++] = i * 16 + j;
  }
  __syncthreads();
  // A thread has one column, of every `step`th row.
  const int width = (count + 15) / 16 * 16, step = CAPACITY / width, at = thread % width, begin = thread / width;
  if (begin >= step) return;
  const bool real = at < count;
  const int column = real ? list[at] : 0;
  u16* const to = (of_x ? rest : sub) + (size_t)row0 * CAPACITY + at;
#pragma unroll 4
  for (int r = begin; r < height; r += step) {
    float value = 0.f;
    if (real) {
      if (of_x) {
        const size_t m = row0 + r;
        const float scale = rows[m] * 0.007874015748031496f;
        value = __fsub_rn(from_half(x[m * stride_x + column]), __fmul_rn((float)codes[m * K + column], scale));
      } else {
        value = (float)weight[(size_t)(row0 + r) * K + column];
      }
    }
    to[(size_t)r * CAPACITY] = to_half(value);
  }
}
