// How a lane of the optimizer step reads and writes elements: parameters, gradients and states in vectors, fp32, bf16 and
// fp16. Settings (macros): P_KIND, G_KIND, BITS8, WIDTH, see optim.cu.

constexpr int EACH = 8;  // elements a lane
constexpr int P_BYTES = P_KIND ? 2 : 4, G_BYTES = G_KIND ? 2 : 4, S_BYTES = BITS8 ? 1 : 4;
constexpr int P_WORDS = EACH * P_BYTES / 4, G_WORDS = EACH * G_BYTES / 4, S_WORDS = EACH * S_BYTES / 4;

template <int BYTES>
__device__ __forceinline__ void load(u32* to, i64 from) {
  if constexpr (BYTES == 16)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from) : "memory");
  else if constexpr (BYTES == 8)
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from) : "memory");
  else
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from) : "memory");
}

template <int BYTES>
__device__ __forceinline__ void store(const u32* from, i64 to) {
  if constexpr (BYTES == 16)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]) : "memory");
  else if constexpr (BYTES == 8)
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(to), "r"(from[0]), "r"(from[1]) : "memory");
  else
    asm volatile("st.global.u32 [%0], %1;" :: "l"(to), "r"(from[0]) : "memory");
}

// A lane's 8 elements of SIZE bytes lie in vectors of WIDTH elements, 32 * WIDTH elements apart. vector: the number of the
// lane's first one in the tensor that begins at `base`.
template <int SIZE>
__device__ __forceinline__ i64 address(i64 base, u32 vector) { return base + u64(vector) * (WIDTH * SIZE); }

template <int SIZE>
__device__ __forceinline__ void load_block(u32* to, i64 base, u32 vector) {
#pragma unroll
  for (int j = 0; j < EACH / WIDTH; j++)
    load<WIDTH * SIZE>(to + j * WIDTH * SIZE / 4, address<SIZE>(base, vector) + j * 32 * WIDTH * SIZE);
}

template <int SIZE>
__device__ __forceinline__ void store_block(const u32* from, i64 base, u32 vector) {
#pragma unroll
  for (int j = 0; j < EACH / WIDTH; j++)
    store<WIDTH * SIZE>(from + j * WIDTH * SIZE / 4, address<SIZE>(base, vector) + j * 32 * WIDTH * SIZE);
}

// Ask the second-level cache for them.
template <int SIZE>
__device__ __forceinline__ void expect_block(i64 base, u32 vector) {
#pragma unroll
  for (int j = 0; j < EACH / WIDTH; j++)
    asm volatile("prefetch.global.L2 [%0];" :: "l"(address<SIZE>(base, vector) + j * 32 * WIDTH * SIZE));
}

// The position within its block of element e of a lane.
__device__ __forceinline__ int place(int e, int lane) { return (e / WIDTH * 32 + lane) * WIDTH + e % WIDTH; }

template <int KIND>
__device__ __forceinline__ float to_float(u32 bits) {  // of the low 16 bits, or all
  if constexpr (KIND == 0) return __uint_as_float(bits);
  if constexpr (KIND == 1) return __uint_as_float(bits << 16);
  float y;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(bits));
  return y;
}

template <int KIND>
__device__ __forceinline__ float element(const u32* words, int e) {
  if constexpr (KIND == 0) return __uint_as_float(words[e]);
  u32 word = words[e / 2];
  if constexpr (KIND == 1) return __uint_as_float(e % 2 ? word & 0xffff0000u : word << 16);
  return to_float<KIND>(e % 2 ? word >> 16 : word & 0xffffu);
}

// Two floats rounded to 16 bits, the first in the low half.
template <int KIND>
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 d;
  if constexpr (KIND == 1)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ float load_one(i64 from, int kind) {
  if (kind == 0) return *reinterpret_cast<const float*>(from);
  u32 bits = *reinterpret_cast<const unsigned short*>(from);
  return kind == 1 ? to_float<1>(bits) : to_float<2>(bits);
}

__device__ __forceinline__ void store_one(i64 to, float value) {
  if constexpr (P_KIND == 0)
    *reinterpret_cast<float*>(to) = value;
  else
    *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(pack<P_KIND ? P_KIND : 1>(value, 0.0f));
}
