// What the Hopper kernels share: barriers, the bulk tensor copy engine, clusters, and 16-bit values.
//
// A source includes it by name; compile.py hands it to the compiler, and its text is part of the cached kernel's key.
// FP16, where it is defined, says what 16-bit values are: fp16 (1) or bf16 (0).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap { char bytes[128]; };

// ---- order of kernels ----

// Let the next kernel on the stream begin, and wait for the one before this: what came before could overlap with it.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.launch_dependents;\n griddepcontrol.wait;" ::: "memory");
}

// ---- barriers in shared memory (mbarrier) ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_end(u32 bar) {  // before its memory has another use
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
// After the last barrier_init of a thread block: other blocks of the cluster and the copy engine see them.
__device__ __forceinline__ void barriers_are_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_arrive_at(u32 bar, u32 rank) {  // the barrier of another block of the cluster
  asm volatile("{\n .reg .b32 a;\n mapa.shared::cluster.u32 a, %0, %1;\n mbarrier.arrive.shared::cluster.b64 _, [a];\n}"
               ::"r"(bar), "r"(rank) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n .reg .pred p;\n WAIT_LOOP:\n mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n @p bra WAIT_DONE;\n"
      " bra WAIT_LOOP;\n WAIT_DONE:\n}" ::"r"(bar), "r"(parity) : "memory");
}
template <int ID, int COUNT> __device__ __forceinline__ void sync_some() {  // COUNT threads, by named barrier
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(COUNT) : "memory");
}

// ---- bulk tensor copies ----

__device__ __forceinline__ void copy_tile(u32 to, const TensorMap* map, int x, int y, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(bar) : "memory");
}
template <int BLOCKS>  // into the shared memory of BLOCKS blocks of the cluster from the `first` on, at the same address of each
__device__ __forceinline__ void copy_tile_to(u32 to, const TensorMap* map, int x, int y, u32 bar, u32 first = 0) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(bar), "h"((u16)(((1 << BLOCKS) - 1) << first)) : "memory");
}

// ---- clusters ----

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
__device__ __forceinline__ float4 load_remote(u32 address, u32 rank) {  // 16 bytes of another block's shared memory
  float4 v;
  asm volatile(
      "{\n .reg .u32 a;\n mapa.shared::cluster.u32 a, %4, %5;\n ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address), "r"(rank) : "memory");
  return v;
}

// ---- shared memory ----

__device__ __forceinline__ u32 load_shared(u32 from) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}
__device__ __forceinline__ u32 load_pair(u32 from) {  // 2 bytes
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from));
  return v;
}
__device__ __forceinline__ uint4 load_shared16(u32 from) {  // 16 bytes
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store16(u32 to, u32 a, u32 b, u32 c, u32 d) {  // 16 bytes
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---- 16-bit values ----

#ifdef FP16
#if FP16
__device__ __forceinline__ u16 to_half(float v) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v)); return h; }
__device__ __forceinline__ float from_half(u16 h) { float v; asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h)); return v; }
__device__ __forceinline__ u32 to_halves(float low, float high) { u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d; }
__device__ __forceinline__ float low_float(u32 pair) {
  float v;
  asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %1;\n cvt.f32.f16 %0, l;\n}" : "=f"(v) : "r"(pair));
  return v;
}
__device__ __forceinline__ float high_float(u32 pair) {
  float v;
  asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %1;\n cvt.f32.f16 %0, h;\n}" : "=f"(v) : "r"(pair));
  return v;
}
#else
__device__ __forceinline__ u16 to_half(float v) { u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v)); return h; }
__device__ __forceinline__ float from_half(u16 h) { return __uint_as_float((u32)h << 16); }
__device__ __forceinline__ u32 to_halves(float low, float high) { u32 d; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d; }
__device__ __forceinline__ float low_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
#endif

__device__ __forceinline__ u32 times(u32 a, u32 b) {  // of pairs
  u32 d;
#if FP16
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}

// Two of four int8 codes as 16-bit values (0x4140: the lower two; 0x4342: the upper): SELECT puts each under an exponent at which
// its lowest bit counts 1, and what that adds is taken back.
template <int SELECT> __device__ __forceinline__ u32 widen_codes(u32 four) {
  u32 v;
#if FP16
  const u32 biased = __byte_perm(four ^ 0x80808080u, 0x64646464u, SELECT);  // 1024 + 128 + code
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(biased), "r"(0x64806480u));
#else
  const u32 both = __byte_perm(four, 0x43434343u, SELECT);  // 128 + the lower 7 bits; 128 or 256 by the sign bit
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(both & 0xff7fff7fu), "r"(both & 0xff80ff80u));
#endif
  return v;
}
#endif
