// Persistent thread blocks that share out tiles evenly (stream-K), for kernels of pairs of thread blocks (clusters).
//
// The tiles that do not fill whole waves are cut along the sum into equal shares, one a cluster. A share that ends inside a tile leaves
// its sums in memory; whoever has the tile's end adds them, in a fixed order: results repeat bit for bit. A cluster does the piece that
// others wait for first, and waits only for clusters before it, so that it cannot hang.

// The pieces of work of one cluster, the same for all its warps: shares of the first `shared_tiles` tiles, then whole tiles.
struct Work {
  int low, high, steps_a_tile, shared, next, tiles, clusters;
  int tile, begin, steps;  // the piece: `steps` steps of a tile from `begin` on
  __device__ Work(int cluster, int clusters, int tiles, int shared, int steps_a_tile)
      : steps_a_tile(steps_a_tile), shared(shared), next(shared + cluster), tiles(tiles), clusters(clusters) {
    low = start(cluster), high = start(cluster + 1);
  }
  __device__ int start(int cluster) const { return (int)((long long)shared * steps_a_tile * cluster / clusters); }
  __device__ bool advance() {
    if (high > low) {
      tile = (high - 1) / steps_a_tile;
      const int from = max(low, tile * steps_a_tile);
      begin = from - tile * steps_a_tile, steps = high - from;
      high = from;
      return true;
    }
    if (next >= tiles) return false;
    tile = next, begin = 0, steps = steps_a_tile;
    next += clusters;
    return true;
  }
  __device__ bool ends_tile() const { return begin + steps == steps_a_tile; }
};

template <int SLOTS> struct Ring {  // a place in a ring of stages
  int slot = 0;
  u32 phase = 0;
  __device__ void advance() {
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
};

// Unfinished sums of warpgroup `part` (of 4 a cluster; two a thread block) go to memory, and a flag says so. `sync` is that of the warpgroup.
template <int COUNT, typename Sync>
__device__ __forceinline__ void leave_sums(const float (&acc)[COUNT], float4* workspace, u64* flags, u64 launch, int part, int in_group, Sync sync) {
  float4* const mine = workspace + (size_t)part * (COUNT / 4 * 128) + in_group;
#pragma unroll
  for (int i = 0; i < COUNT / 4; i++) __stcg(mine + i * 128, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  __threadfence();
  sync();
  if (in_group == 0) asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flags + part), "l"(launch) : "memory");
}

// What clusters before this one left of its tile, added in a fixed order. `part`: of this cluster's four.
template <int COUNT, typename Sync>
__device__ __forceinline__ void add_sums(float (&acc)[COUNT], const Work& work, int cluster, const float4* workspace, u64* flags, u64 launch, int part,
                                         int in_group, Sync sync) {
  const int first = work.tile * work.steps_a_tile;
  for (int c = cluster - 1; c >= 0 && work.start(c + 1) > first; c--) {
    if (work.start(c) == work.start(c + 1)) continue;  // no share
    const int from = c * 4 + part;
    if (in_group == 0) {
      u64 seen;
      do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flags + from) : "memory");
      while (seen != launch);
      flags[from] = 0;  // a replay of this launch has to wait again
    }
    sync();
    const float4* const theirs = workspace + (size_t)from * (COUNT / 4 * 128) + in_group;
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) {
      const float4 v = __ldcg(theirs + i * 128);
      acc[4 * i] += v.x, acc[4 * i + 1] += v.y, acc[4 * i + 2] += v.z, acc[4 * i + 3] += v.w;
    }
  }
}
