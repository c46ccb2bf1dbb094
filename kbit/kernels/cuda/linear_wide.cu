// A kernel of its own for wide.h: 4-bit products of many tokens, and int8 ones whose inputs stay in 16 bits.

#include "hopper.h"
#include "wide.h"

extern "C" __global__ void __launch_bounds__(wide::THREADS, 1) __cluster_dims__(2, 1, 1)
linear_wide(const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_x, const void* __restrict__ absmax,
            const float* __restrict__ nested_absmax, const float* __restrict__ offset, const u16* __restrict__ bias,
            u16* __restrict__ out, float4* workspace, u64* flags, u64 launch, int M, int N, int K, int block_shift, int shared_tiles) {
  extern __shared__ u8 raw_shared[];
  const u32 base = (shared_address(raw_shared) + 1023) & ~1023u;
  wide::multiply<2, true>(base, map_w, map_x, blockIdx.x, gridDim.x, absmax, nested_absmax, offset, bias, out, workspace, flags, launch, M, N,
                          K, block_shift, shared_tiles);
}
