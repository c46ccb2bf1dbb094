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
