// How linear_4bit.cu and linear_4bit_few.cu begin, whom one launcher starts: name, parameters, and which rows of which weight a thread
// block has. Included where the name stands. With weights > 1 (weights.h) a block finds its own by its tile.

#if WEIGHTS > 1
linear_4bit(const __grid_constant__ Weights weights, const __grid_constant__ TensorMap map_x, const __grid_constant__ Outs outs, int M, int K,
            int block_shift) {
  const int mine = weight_of(weights, blockIdx.x);
  const Weight& weight = weights.weight[mine];
  const TensorMap& map_w = weight.map_w;
  const void* const __restrict__ absmax = weight.absmax;
  const float* const __restrict__ nested_absmax = weight.nested_absmax;
  const float* const __restrict__ offset = weight.offset;
  const u16* const __restrict__ bias = weight.bias;
  u16* const __restrict__ out = outs.out[mine];
  const int N = weight.n, row0 = ((int)blockIdx.x - weight.first_tile) * ROWS;
#else
linear_4bit(const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_x, const void* __restrict__ absmax,
            const float* __restrict__ nested_absmax, const float* __restrict__ offset, const u16* __restrict__ bias,
            u16* __restrict__ out, int M, int N, int K, int block_shift, const int* __restrict__ offsets, int experts) {
  const int row0 = blockIdx.x * ROWS;
#endif
