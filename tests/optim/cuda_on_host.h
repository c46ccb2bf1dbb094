// What optim.cu needs of CUDA, for one warp of 32 host threads; see cuda_on_host.py.
#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
using std::max;

struct Dimension {
  unsigned x;
};
struct float4 {
  float x, y, z, w;
};
static thread_local Dimension threadIdx{0};
static Dimension blockIdx{0}, gridDim{1};
alignas(1024) static char memory[300000];

static pthread_barrier_t barrier;
static long long exchanged[32];

static void __syncwarp() { pthread_barrier_wait(&barrier); }
static void __syncthreads() { pthread_barrier_wait(&barrier); }
static void exchange(long long value) {
  exchanged[threadIdx.x] = value;
  __syncwarp();
}
static unsigned __reduce_max_sync(unsigned, unsigned value) {
  exchange(value);
  long long most = *std::max_element(exchanged, exchanged + 32);
  __syncwarp();
  return unsigned(most);
}
static int __all_sync(unsigned, int value) {
  exchange(value != 0);
  long long least = *std::min_element(exchanged, exchanged + 32);
  __syncwarp();
  return int(least);
}
static long long __shfl_sync(unsigned, long long value, int lane) {
  exchange(value);
  long long found = exchanged[lane];
  __syncwarp();
  return found;
}
template <typename Body> static void host_warp(Body body) {
  pthread_barrier_init(&barrier, nullptr, 32);
  std::vector<std::thread> lanes;
  for (unsigned lane = 0; lane < 32; lane++) lanes.emplace_back([=] { threadIdx.x = lane, body(); });
  for (auto& lane : lanes) lane.join();
}
static void __threadfence() {}
static unsigned atomicAdd(unsigned* at, unsigned value) { return *at += value, *at - value; }

static float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsqrt_rn(float a) { return sqrtf(a); }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __frcp_rn(float a) { return 1.0f / a; }

static float host_flush(float a) { return fabsf(a) < 1.17549435e-38f ? copysignf(0.0f, a) : a; }
// fma.rp.ftz.f32 for a product of a sign with `smallest`, which the sum is no less than: rounded up.
static float host_fma_up(float a, float b, float smallest) {
  double product = double(host_flush(a)) * host_flush(b), sum = product + smallest;  // the sum is exact, or next to smallest
  float rounded = float(sum);
  bool up = rounded < sum || (sum == smallest && product > 0);
  return up ? nextafterf(rounded, INFINITY) : rounded;
}
static float host_larger(float a, float b) { return a != a || b != b ? NAN : std::max(a, fabsf(b)); }
// prmt.b32: four bytes chosen out of eight by nibbles; a nibble's upper bit asks for the byte's sign instead.
static unsigned host_permute(unsigned a, unsigned b, unsigned selector) {
  unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned chosen = 0;
  for (int i = 0; i < 4; i++) {
    unsigned nibble = selector >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    chosen |= byte << 8 * i;
  }
  return chosen;
}
// Kinds: 0 fp32, 1 bf16, 2 fp16.
static float host_float(int kind, unsigned bits) {
  return kind == 0 ? __uint_as_float(bits) : kind == 1 ? __uint_as_float(bits << 16) : _cvtsh_ss((unsigned short)bits);
}
static unsigned host_bits(int kind, float value) {
  if (kind == 2) return (unsigned short)_cvtss_sh(value, 0);
  unsigned bits = __float_as_uint(value);
  return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
