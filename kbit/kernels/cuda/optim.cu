// Optimizer step of all tensors of a batch in one launch, for compute capability 8.0 and later (kernels/triton/optim.py
// is the portable version). The mathematics is kbit/optim/rules.py, operation for operation: a product and a sum are
// rounded separately unless `fmaf` is written.
//
// One warp advances a block of 256 elements, 8 elements a lane: the block's absmax is a warp reduction, and warps never
// wait for each other. The grid is as large as the GPU; its warps walk over the blocks of all tensors side by side.
//
// Decoding: the 256 values lie 32-fold in shared memory, one copy a bank, so that a warp reads any 32 codes without
// conflict. Byte 1 of the address is the code, byte 0 the lane: one byte permutation makes it.
// Encoding: the upper 16 bits of |x| / absmax * SCALE name a cell of floats that holds at most one midpoint between two codes.
// The table has, for each cell, a number that turns the float's bits into the code by one addition: (code below the
// midpoint) << 16, plus what makes the low 16 bits carry where they exceed the midpoint's, less the cell itself.
//
// Settings (macros): ALGO, FLAGS, DECAY, BITS8, SKIP, STOCHASTIC, KAHAN as in rules.py and optim.py; P_KIND, G_KIND 0
// fp32, 1 bf16, 2 fp16; WIDTH elements of a vector access; THREADS, CTAS launch bounds; FAST: approximate quotients
// and roots; LR_KIND: learning rate by value, or read from 1 fp32, 2 fp64; SCALE, CELLS, SIGNED_TOP:
// of the encoding tables.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned char u8;

#define ADEMAMIX 1
#define LION 2
#define SGD 3
#define RMSPROP 4
#define COUPLED 1
#define DECOUPLED 2
#define IN_DIRECTION 3

// Which states there are, and which have a sign.
#define STATES ((ALGO == SGD ? (FLAGS & 2 ? 1 : 0) : 1) + (ALGO <= 1 ? 1 : 0) + (ALGO == ADEMAMIX ? 1 : 0) + \
                (ALGO == RMSPROP ? (FLAGS & 2 ? 1 : 0) + (FLAGS & 4 ? 1 : 0) : 0))
#define ROOM (STATES ? STATES : 1)
#define QUANTIZED (BITS8 && STATES)
__device__ constexpr bool has_sign(int state) {
  return state == 0 ? ALGO < 4 : state == 1 ? ALGO != 0 : ALGO != 1;
}

constexpr u32 EVERYONE = 0xffffffffu;
constexpr int EACH = 8;  // elements a lane
constexpr int P_BYTES = P_KIND ? 2 : 4, G_BYTES = G_KIND ? 2 : 4, S_BYTES = BITS8 ? 1 : 4;
constexpr int P_WORDS = EACH * P_BYTES / 4, G_WORDS = EACH * G_BYTES / 4, S_WORDS = EACH * S_BYTES / 4;
constexpr u32 INFINITE = 0x7f800000u;

// Columns of a table row, see kbit/optim/batch.py.
enum { P_AT, G_AT, S_AT, A_AT = S_AT + 3, COUNT = A_AT + 3, UNUSED, STEP_AT, REST_AT, SEED, FIRST, BASE, COLUMNS = 16 };

struct Hyper {
  double rate, decay, b1, b2, b3, eps, alpha, t_alpha, t_beta3, log1, log2, log3, lr_decay, dampening, corrected, cap;
};

struct Scalars {
  float rate, shrink, l2, dir_decay, b1, c1, b2, c2, b3, c3, inv1, inv2, eps, alpha, cap, count;
};

// A tensor as its warp sees it.
struct alignas(16) Area {
  i64 row[COLUMNS];
  Scalars h;
  int first, whole, end;  // numbers of its first block, and of those behind its last whole and its last block
  int pad;
};

struct Shared {
  float values[BITS8 ? 256 : 1][2][32];  // [code][signed, unsigned][lane]
  u32 cells[2][CELLS];
  Area areas[THREADS / 32];
  Scalars common;
  int last;
};

// Read from shared memory each time, so that no register is held for it.
__device__ __forceinline__ i64 of(const Area& area, int column) {
  return *const_cast<const volatile i64*>(&area.row[column]);
}

__device__ __forceinline__ Scalars scalars_of(const Area& area) {
  const float4* four = reinterpret_cast<const float4*>(&area.h);
  float4 a = four[0], b = four[1], c = four[2], d = four[3];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w, d.x, d.y, d.z, d.w};
}

// What a lane has loaded of a block.
struct Raw {
  u32 p[P_WORDS], g[G_WORDS], rest[KAHAN ? P_WORDS : 1], s[ROOM][S_WORDS], absmax[ROOM];
};

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }

__device__ __forceinline__ float root(float x) {
#if FAST
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __fsqrt_rn(x);
#endif
}

__device__ __forceinline__ float quotient(float x, float y) {
#if FAST
  float z;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return __fdiv_rn(x, y);
#endif
}

// The larger magnitude; NaN if either is.
__device__ __forceinline__ float larger(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(fabsf(b)));
  return y;
}

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

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

__device__ __forceinline__ u32 scramble(u32 x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// Everything that depends only on settings, learning rate and step count, in float64; see rules.scalars.
__device__ __noinline__ void make_scalars(Scalars& out, const Hyper& hyper, const void* lr, float count) {
  double step = count, rate = hyper.rate, b1 = hyper.b1, b2 = hyper.b2, b3 = hyper.b3, alpha = hyper.alpha;
#if LR_KIND == 1
  rate = *static_cast<const float*>(lr);
#elif LR_KIND == 2
  rate = *static_cast<const double*>(lr);
#endif
  double c1 = 1.0 - b1, inv1 = 1.0, inv2 = 1.0;
  out.shrink = DECAY == DECOUPLED ? float(1.0 - rate * hyper.decay) : 1.0f;
  out.l2 = DECAY == COUPLED ? float(hyper.decay) : 0.0f;
  out.dir_decay = DECAY == IN_DIRECTION ? float(hyper.decay) : 0.0f;
#if ALGO <= 1
  if (hyper.corrected != 0.0) {
    inv1 = 1.0 / (1.0 - exp(step * hyper.log1));
    inv2 = 1.0 / sqrt(1.0 - exp(step * hyper.log2));
  }
#endif
#if ALGO == ADEMAMIX
  if (hyper.t_alpha > 0.0) alpha = fmin(step * alpha / hyper.t_alpha, alpha);
  if (hyper.t_beta3 > 0.0 && step < hyper.t_beta3) {
    double part = step / hyper.t_beta3;
    b3 = fmin(exp(hyper.log1 * hyper.log3 / ((1.0 - part) * hyper.log3 + part * hyper.log1)), b3);
  }
#endif
#if ALGO == SGD
  // The first buffer is the gradient itself, undamped.
  c1 = count == 1.0f ? 1.0 : 1.0 - hyper.dampening;
  b2 = b1;
  if (count == 1.0f) b1 = 0.0;
#endif
#if ALGO == 5
  rate = rate / (1.0 + (step - 1.0) * hyper.lr_decay);
#endif
  out.rate = float(rate);
  out.b1 = float(b1), out.c1 = float(c1);
  out.b2 = float(b2), out.c2 = float(1.0 - b2);
  out.b3 = float(b3), out.c3 = float(1.0 - b3);
  out.inv1 = float(inv1), out.inv2 = float(inv2);
  out.eps = float(hyper.eps), out.alpha = float(alpha), out.cap = float(hyper.cap), out.count = count;
}

// New states in place of the old ones; the direction is returned. See rules.advance.
__device__ __forceinline__ float advance(float p, float g, float* s, const Scalars& h) {
  float direction = g;
#if ALGO == 0
  s[0] = add(mul(s[0], h.b1), mul(g, h.c1));
  s[1] = add(mul(s[1], h.b2), mul(mul(g, g), h.c2));
  direction = quotient(mul(s[0], h.inv1), add(mul(root(s[1]), h.inv2), h.eps));
#elif ALGO == ADEMAMIX
  s[0] = add(mul(s[0], h.b1), mul(g, h.c1));
  s[1] = add(mul(s[1], h.b3), mul(g, h.c3));
  s[2] = add(mul(s[2], h.b2), mul(mul(g, g), h.c2));
  direction = quotient(add(mul(s[0], h.inv1), mul(s[1], h.alpha)), add(mul(root(s[2]), h.inv2), h.eps));
#elif ALGO == LION
  float c = add(mul(s[0], h.b1), mul(g, h.c1));
  direction = c > 0.0f ? 1.0f : c < 0.0f ? -1.0f : c;
  s[0] = add(mul(s[0], h.b2), mul(g, h.c2));
#elif ALGO == SGD
#if FLAGS & 2
  s[0] = fmaf(g, h.c1, mul(s[0], h.b1));
  direction = FLAGS & 1 ? fmaf(s[0], h.b2, g) : s[0];
#endif
#elif ALGO == RMSPROP
  s[0] = add(mul(s[0], h.b1), mul(mul(g, g), h.c1));
  float spread = s[0];
#if FLAGS & 4
  float& average = s[FLAGS & 2 ? 2 : 1];
  average = add(mul(average, h.b1), mul(g, h.c1));
  spread = add(spread, -mul(average, average));
  if (spread < 0.0f) spread = 0.0f;
#endif
  direction = quotient(g, add(root(spread), h.eps));
#if FLAGS & 2
  direction = add(mul(s[1], h.b2), direction);
  s[1] = direction;
#endif
#else
  s[0] = add(s[0], mul(g, g));
  direction = quotient(g, add(root(s[0]), h.eps));
#endif
  if (DECAY == IN_DIRECTION) direction = add(direction, mul(p, h.dir_decay));
  return direction;
}

// The value of a code under its lane's copy of the table; lane_at: lane * 4.
template <bool SIGNED>
__device__ __forceinline__ float decode(const Shared& shared, u32 word, int byte, u32 lane_at) {
  u32 at = permute(word, lane_at, 0x6604u | byte << 4);
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(shared.values) + (SIGNED ? 0 : 128) + at);
}

// The sum whose byte 2 is the code of x (of |x|, plus 127, where SIGNED). inverse: SCALE / absmax. Scaled so, a value
// below the first cell is subnormal and becomes 0, without a comparison. Values exactly between two codes go inward.
template <bool SIGNED>
__device__ __forceinline__ u32 encode(const Shared& shared, float x, float inverse) {
  float a;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(a) : "f"(x), "f"(inverse));
  if (SIGNED) a = fabsf(fmaxf(a, -SIGNED_TOP));  // there is no code for -1
  u32 bits = __float_as_uint(a);
  return shared.cells[SIGNED ? 0 : 1][bits >> 16] + bits;
}

// Codes of four elements from their sums and their signs.
template <bool SIGNED>
__device__ __forceinline__ u32 pack_codes(const u32* sums, const float* x) {
  u32 codes = permute(permute(sums[0], sums[1], 0x62), permute(sums[2], sums[3], 0x62), 0x5410);
  if (!SIGNED) return codes;
  u32 first = permute(__float_as_uint(x[0]), __float_as_uint(x[1]), 0xfb);
  u32 second = permute(__float_as_uint(x[2]), __float_as_uint(x[3]), 0xfb);
  u32 negative = permute(first, second, 0x5410);  // 0xff where the sign is set: 254 - code there
  return (codes ^ negative) - (negative & 0x01010101u);
}

template <bool SIGNED>
__device__ __forceinline__ void encode_block(const Shared& shared, const float* x, float inverse, u32* words) {
#pragma unroll
  for (int k = 0; k < EACH / 4; k++) {
    u32 sums[4];
#pragma unroll
    for (int e = 0; e < 4; e++) sums[e] = encode<SIGNED>(shared, x[k * 4 + e], inverse);
    words[k] = pack_codes<SIGNED>(sums, x + k * 4);
  }
}

// SCALE / absmax, rounded to nearest but for the rarest cases; 0 for 0.
__device__ __forceinline__ float inverse_of(u32 absmax) {
  float x = __uint_as_float(absmax), y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  y = fmaf(y, fmaf(-x, y, 1.0f), y);
  return absmax ? y * SCALE : 0.0f;
}

// The moved parameter under its dtype's rounding. index: of the element in its parameter.
__device__ __forceinline__ float noisy(float moved, i64 index, const Area& area) {
  u32 key = scramble(u32(int(area.h.count)) * 0x9e3779b9u + u32(area.row[SEED]));
  u32 noise = scramble(u32(index) + key + u32(index >> 32) * 0x85ebca6bu) & 0xffffu;
  u32 bits = (__float_as_uint(moved) + noise) & 0xffff0000u;
  return fabsf(moved) < __uint_as_float(INFINITE) ? __uint_as_float(bits) : moved;
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

// Any block, element by element: one that ends early or starts at an odd address, that meets NaN or infinity, or whose
// absmax is so small that subnormal values (which count as zero) would have codes, or very large.
__device__ __noinline__ void careful(Shared& shared, const Area& area, i64 begin) {
  int lane = threadIdx.x % 32;
  float s[ROOM][EACH];
  const Scalars h = area.h;
  u32 top[ROOM] = {};
#pragma unroll 1
  for (int e = 0; e < EACH; e++) {
    i64 at = begin + place(e, lane);
    bool live = at < area.row[COUNT];
    float p = live ? load_one(area.row[P_AT] + at * P_BYTES, P_KIND) : 0.0f;
    float g = live ? load_one(area.row[G_AT] + at * G_BYTES, G_KIND) : 0.0f;
    if (KAHAN && live) p = add(p, load_one(area.row[REST_AT] + at * P_BYTES, P_KIND));
    float old[ROOM] = {}, fresh[ROOM] = {};
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      if (BITS8) {
        u32 code = live ? *reinterpret_cast<const u8*>(area.row[S_AT + k] + at) : 0;
        float absmax = *reinterpret_cast<const float*>(area.row[A_AT + k] + begin / 256 * 4);
        old[k] = live ? mul(shared.values[code][has_sign(k) ? 0 : 1][lane], absmax) : 0.0f;
      } else if (live) {
        old[k] = *reinterpret_cast<const float*>(area.row[S_AT + k] + at * 4);
      }
      fresh[k] = old[k];
    }
    bool keep = !SKIP || g != 0.0f;
    if (DECAY == COUPLED) g = fmaf(p, h.l2, g);
    float direction = advance(p, g, fresh, h);
    float moved = fmaf(direction, -h.rate, mul(p, h.shrink));
    if (QUANTIZED) {
#pragma unroll
      for (int k = 0; k < STATES; k++) keep = keep && fabsf(fresh[k]) < __uint_as_float(INFINITE);
    }
    if (!keep) moved = p;
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      if (!keep) fresh[k] = old[k];
      if (!BITS8) {
        if (live) *reinterpret_cast<float*>(area.row[S_AT + k] + at * 4) = fresh[k];
        continue;
      }
      u32 bits = __float_as_uint(fresh[k]) & 0x7fffffffu;
      if (bits < 0x00800000u) fresh[k] = 0.0f, bits = 0;
      top[k] = max(top[k], bits);
#pragma unroll
      for (int at = 0; at < EACH; at++)
        if (at == e) s[k][at] = fresh[k];
    }
    if (!live) continue;
    if (STOCHASTIC) moved = noisy(moved, at + area.row[BASE], area);
    store_one(area.row[P_AT] + at * P_BYTES, moved);
    if (KAHAN) {
      float rounded = load_one(area.row[P_AT] + at * P_BYTES, P_KIND);
      store_one(area.row[REST_AT] + at * P_BYTES, add(moved, -rounded));
    }
  }
  if (!QUANTIZED) return;
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    u32 absmax = __reduce_max_sync(EVERYONE, top[k]), words[EACH / 4];
    float inverse = absmax ? __frcp_rn(__uint_as_float(absmax)) : 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; e++) s[k][e] = mul(s[k][e], inverse);
    if (has_sign(k))
      encode_block<true>(shared, s[k], SCALE, words);
    else
      encode_block<false>(shared, s[k], SCALE, words);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      i64 at = begin + place(e, lane);
      if (at < area.row[COUNT]) *reinterpret_cast<u8*>(area.row[S_AT + k] + at) = u8(words[e / 4] >> e % 4 * 8);
    }
    if (lane == 0) *reinterpret_cast<u32*>(area.row[A_AT + k] + begin / 256 * 4) = absmax;
  }
}

// A whole block of aligned tensors, through registers. False, with nothing written, where it needs `careful`.
// ahead: how many blocks further this warp's next one is, 0 if it is another tensor's.
__device__ __forceinline__ bool quick(Shared& shared, const Area& area, u32 block, u32 ahead) {
  u32 lane = threadIdx.x % 32, vector = block * (256 / WIDTH) + lane, next = vector + ahead * (256 / WIDTH);
  Raw raw;
  i64 p_at = of(area, P_AT), g_at = of(area, G_AT);
  load_block<P_BYTES>(raw.p, p_at, vector);
  load_block<G_BYTES>(raw.g, g_at, vector);
  if (KAHAN) load_block<P_BYTES>(raw.rest, of(area, REST_AT), vector);
  if (PREFETCH && ahead) expect_block<P_BYTES>(p_at, next), expect_block<G_BYTES>(g_at, next);
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    i64 s_at = of(area, S_AT + k);
    load_block<S_BYTES>(raw.s[k], s_at, vector);
    if (BITS8) load<4>(raw.absmax + k, of(area, A_AT + k) + u64(block) * 4);
    if (PREFETCH && ahead) expect_block<S_BYTES>(s_at, next);
  }
  u32 lane_at = lane * 4;
  const Scalars h = scalars_of(area);
  float s[ROOM][EACH], top[ROOM] = {};
  u32 out[P_WORDS], rest[KAHAN ? P_WORDS : 1];
  float held[2], left[2];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    float p = element<P_KIND>(raw.p, e), g = element<G_KIND>(raw.g, e);
    if (KAHAN) p = add(p, element<P_KIND>(raw.rest, e));
    float fresh[ROOM], old[ROOM];
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      if (!BITS8)
        old[k] = __uint_as_float(raw.s[k][e % S_WORDS]);
      else if (has_sign(k))
        old[k] = mul(decode<true>(shared, raw.s[k][e / 4 % S_WORDS], e % 4, lane_at), __uint_as_float(raw.absmax[k]));
      else
        old[k] = mul(decode<false>(shared, raw.s[k][e / 4 % S_WORDS], e % 4, lane_at), __uint_as_float(raw.absmax[k]));
      fresh[k] = old[k];
    }
    bool keep = !SKIP || g != 0.0f;
    if (DECAY == COUPLED) g = fmaf(p, h.l2, g);
    float direction = advance(p, g, fresh, h);
    float moved = fmaf(direction, -h.rate, mul(p, h.shrink));
    if (SKIP && !keep) moved = p;
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      if (SKIP && !keep) fresh[k] = old[k];
      s[k][e] = fresh[k];
      if (QUANTIZED) top[k] = larger(top[k], fresh[k]);
    }
    if (STOCHASTIC) moved = noisy(moved, i64(block) * 256 + place(e, lane) + of(area, BASE), area);
    if constexpr (P_KIND == 0) {
      out[e] = __float_as_uint(moved);
    } else {
      held[e % 2] = moved;
      if (e % 2) {
        u32 word = out[e / 2] = pack<P_KIND ? P_KIND : 1>(held[0], held[1]);
        if (KAHAN) {
          left[0] = add(held[0], -element<P_KIND>(&word, 0)), left[1] = add(held[1], -element<P_KIND>(&word, 1));
          rest[e / 2] = pack<P_KIND ? P_KIND : 1>(left[0], left[1]);
        }
      }
    }
  }
  u32 absmax[ROOM] = {};
  if (QUANTIZED) {
    bool fine = true;
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      absmax[k] = __reduce_max_sync(EVERYONE, __float_as_uint(top[k]));
      // Zero, or from 1e-30 to 2**23: not infinite or NaN, and SCALE / absmax is a normal number.
      fine = fine && (absmax[k] == 0 || absmax[k] - 0x0da24260u < 0x4b000000u - 0x0da24260u);
    }
    if (!fine) return false;
  }
  store_block<P_BYTES>(out, of(area, P_AT), vector);
  if (KAHAN) store_block<P_BYTES>(rest, of(area, REST_AT), vector);
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    u32 words[S_WORDS];
    if (BITS8) {
      if (has_sign(k))
        encode_block<true>(shared, s[k], inverse_of(absmax[k]), words);
      else
        encode_block<false>(shared, s[k], inverse_of(absmax[k]), words);
      if (lane == 0) store<4>(absmax + k, of(area, A_AT + k) + u64(block) * 4);
    } else {
#pragma unroll
      for (int e = 0; e < EACH; e++) words[e % S_WORDS] = __float_as_uint(s[k][e]);
    }
    store_block<S_BYTES>(words, of(area, S_AT + k), vector);
  }
  return true;
}

// Put the tensor that block `number` belongs to into `area`. first: a row at or before it. -> its row.
__device__ __noinline__ int find(Shared& shared, Area& area, const i64* table, int rows, int blocks, int number,
                                 int first, const Hyper& hyper, const void* lr) {
  int lane = threadIdx.x % 32, high = rows;  // table[first].FIRST <= number < table[high].FIRST
  while (high - first > 1) {
    int middle = (first + high) / 2;
    if (table[i64(middle) * COLUMNS + FIRST] <= number) first = middle;
    else high = middle;
  }
  i64 mine = lane < COLUMNS ? table[i64(first) * COLUMNS + lane] : 0;
  bool pointer = lane < A_AT || lane == REST_AT;
  int aligned = __all_sync(EVERYONE, !pointer || mine % 16 == 0);
  __syncwarp();
  if (lane < COLUMNS) area.row[lane] = mine;
  i64 step_at = __shfl_sync(EVERYONE, mine, STEP_AT), mine_first = __shfl_sync(EVERYONE, mine, FIRST);
  float count = *reinterpret_cast<const float*>(step_at) + 1.0f;
  if (lane == 0) {
    area.first = int(mine_first);
    area.end = first + 1 < rows ? int(table[i64(first + 1) * COLUMNS + FIRST]) : blocks;
    area.whole = aligned ? area.first + int(area.row[COUNT] / 256) : area.first;
    if (count == shared.common.count) area.h = shared.common;
    else make_scalars(area.h, hyper, lr, count);
  }
  __syncwarp();
  return first;
}

// table: [rows, 16]; blocks: of all rows together; lookup: 256 signed values, 256 unsigned ones, signed and unsigned
// cells; counted: the table whose `counted_rows` step counts go up by one once the whole grid is done; tickets: 0.
extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
optim(const i64* table, int rows, int blocks, const u32* lookup, const __grid_constant__ Hyper hyper, const void* lr,
      const i64* counted, int counted_rows, u32* tickets) {
  extern __shared__ __align__(1024) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  int thread = threadIdx.x, warp = thread / 32;
#if BITS8
  for (int i = thread; i < 256 * 64; i += THREADS)
    (&shared.values[0][0][0])[i] = __uint_as_float(lookup[(i / 32 % 2) * 256 + i / 64]);
  for (int i = thread; i < 2 * CELLS; i += THREADS) (&shared.cells[0][0])[i] = lookup[512 + i];
#endif
#if __CUDA_ARCH__ >= 900
  // Everything above may overlap with the kernel before this one on the stream.
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (thread == 0 && rows) {
    float count = *reinterpret_cast<const float*>(table[STEP_AT]) + 1.0f;
    make_scalars(shared.common, hyper, lr, count);
  }
  __syncthreads();
  int stride = gridDim.x * (THREADS / 32), number = blockIdx.x * (THREADS / 32) + warp;
  Area& area = shared.areas[warp];
  if (thread % 32 == 0) area.end = 0;
  __syncwarp();
  for (int row = -1; number < blocks; number += stride) {
    if (number >= area.end) row = find(shared, area, table, rows, blocks, number, row + 1, hyper, lr);
    u32 block = number - area.first, ahead = number + stride < area.end ? stride : 0;
    if (number >= area.whole || !quick(shared, area, block, ahead)) careful(shared, area, i64(block) * 256);
  }
  // The last thread block to finish counts the step: everyone has read the old counts by then.
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    shared.last = atomicAdd(tickets, 1u) == gridDim.x - 1;
    if (shared.last) *tickets = 0;
  }
  __syncthreads();
  if (!shared.last) return;
  for (int i = thread; i < counted_rows; i += THREADS)
    *reinterpret_cast<float*>(counted[i64(i) * COLUMNS + STEP_AT]) += 1.0f;
}
