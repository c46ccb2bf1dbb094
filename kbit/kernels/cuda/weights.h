// Several weights of one K that multiply the same x (WEIGHTS > 1): parameters that a thread block finds by its tile. A row
// of tiles goes through all weights.

struct __align__(64) Weight {
  TensorMap map_w;
  const void* absmax;
  const float *nested_absmax, *offset;
  const u16* bias;
  int n, first_tile;
};
struct Weights { Weight weight[WEIGHTS]; };
struct Outs { u16* out[WEIGHTS]; };

__device__ __forceinline__ int weight_of(const Weights& weights, int tile) {
  int mine = 0;
#pragma unroll
  for (int i = 1; i < WEIGHTS; i++) mine += tile >= weights.weight[i].first_tile;
  return mine;
}
