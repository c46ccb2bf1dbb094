// How products of few tokens end: their sums over parts of K lie in shared memory, [PARTS][TOKENS][PITCH] floats at `base` in every
// thread block of a cluster of BLOCKS, and leave in 16 bits. Parts are added in one order, so results repeat.

// finish: of a sum and its out feature (which may lie beyond N), the value to store.
template <int TOKENS, int FEATURES, int PITCH, int PARTS, int THREADS, int BLOCKS, class Finish>
__device__ __forceinline__ void store_sums(u32 base, u32 rank, int thread, int token0, int row0, int M, int N, u16* __restrict__ out, Finish finish) {
  if (BLOCKS > 1) cluster_sync();
  else __syncthreads();
  const int items = min(TOKENS, M - token0) * (FEATURES / 4);
  for (int item = thread + rank * THREADS; item < items; item += THREADS * BLOCKS) {
    const int token = item / (FEATURES / 4), row = item % (FEATURES / 4) * 4, n = row0 + row;
    if (n >= N) continue;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int r = 0; r < BLOCKS; r++)
#pragma unroll
      for (int k = 0; k < PARTS; k++) {
        const u32 at = base + ((k * TOKENS + token) * PITCH + row) * 4;
        float4 v;
        if (BLOCKS > 1) v = load_remote(at, r);
        else asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at));
        sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w;
      }
    float value[4] = {sum.x, sum.y, sum.z, sum.w};
    u16* to = out + (size_t)(token0 + token) * N + n;
    u16 half[4];
#pragma unroll
    for (int i = 0; i < 4; i++) half[i] = to_half(finish(value[i], n + i));
    if ((N & 3) == 0) {
      *(uint2*)to = make_uint2(half[0] | (u32)half[1] << 16, half[2] | (u32)half[3] << 16);
    } else {
      for (int i = 0; i < 4 && n + i < N; i++) to[i] = half[i];
    }
  }
  if (BLOCKS > 1) cluster_sync();  // nobody leaves while its memory is read
}
