// The mathematics of the optimizer step, kbit/optim/rules.py operation for operation: a product and a sum are rounded
// separately unless `fmaf` is written. Settings (macros): ALGO, FLAGS, DECAY, FAST, LR_KIND, BITS8, see optim.cu.

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

struct Hyper {
  double rate, decay, b1, b2, b3, eps, alpha, t_alpha, t_beta3, log1, log2, log3, lr_decay, dampening, corrected, cap;
};

struct Scalars {
  float rate, shrink, l2, dir_decay, b1, c1, b2, c2, b3, c3, inv1, inv2, eps, alpha, cap, count;
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
