// One optimizer step over many tensors on the CPU. The mathematics is kbit/optim/rules.py, operation for operation:
// compiled without contraction and with std::fma where torch fuses, so results equal the plain torch path to the bit.
//
// Work is cut into chunks of 256 elements, which is also the block of 8-bit states: a chunk is decoded into small
// arrays that stay in the L1 cache, advanced with vector instructions, and encoded again. Threads take ranges of the
// chunks of all tensors.

#include "dynamic_map.h"

namespace {

constexpr int CHUNK = MAP_BLOCK;
constexpr int64_t GRAIN = 256;  // chunks that a thread takes at once
constexpr int COLUMNS = 16;   // int64 columns of a table row, see struct Row
constexpr int SCALARS = 16;   // floats of a scalars row, see kbit.optim.rules.Scalars

enum Algorithm { ADAM, ADEMAMIX, LION, SGD, RMSPROP, ADAGRAD };
enum Norm { NO_NORM, CAP, LAMB_TRUST, LARS_TRUST };
enum Flag { NESTEROV = 1, MOMENTUM = 2, CENTERED = 4 };

struct Scalars {
    float rate, shrink, l2, dir_decay, b1, c1, b2, c2, b3, c3, inv_bias1, inv_sqrt_bias2, eps, alpha, max_unorm, step;
};
static_assert(sizeof(Scalars) == SCALARS * sizeof(float), "layout");

// Pointers are stored as integers; absent ones are 0.
struct Row {
    int64_t p, g, state[3], absmax[3], count, scalars, step, compensation, seed, first_program, base, spare;
};
static_assert(sizeof(Row) == COLUMNS * sizeof(int64_t), "layout");

struct Settings {
    int32_t algorithm, flags, decay_in_direction, norm, bits8, skip_zeros, p_dtype, g_dtype, stochastic, kahan, threads;
    Map maps[2];  // unsigned, signed
};

inline void load(float* out, int64_t base, int64_t begin, int n, int dtype) {
    load_floats(out, reinterpret_cast<const void*>(base), begin, n, dtype);
}
inline void store(const float* values, int64_t base, int64_t begin, int n, int dtype) {
    store_floats(values, reinterpret_cast<void*>(base), begin, n, dtype);
}

inline uint32_t scramble(uint32_t x) {
    x ^= x >> 16; x *= 0x7feb352du;
    x ^= x >> 15; x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// bf16 by adding 16 random bits below the kept ones: the expected value is the fp32 one.
void store_stochastic(const float* values, int64_t base, int64_t begin, int n, uint32_t seed, uint32_t step) {
    uint16_t* out = reinterpret_cast<uint16_t*>(base) + begin;
    uint32_t key = scramble(step * 0x9e3779b9u + seed);
    for (int i = 0; i < n; i++) {
        uint64_t index = uint64_t(begin + i);
        uint32_t noise = scramble(uint32_t(index) + key + uint32_t(index >> 32) * 0x85ebca6bu) & 0xffff;
        uint32_t u = bits_of(values[i]);
        bool special = (u & 0x7f800000) == 0x7f800000;
        out[i] = special ? to_bf16(values[i]) : uint16_t((u + noise) >> 16);
    }
}

inline bool state_signed(int algorithm, int slot) {
    if (algorithm == ADAM) return slot == 0;
    if (algorithm == ADEMAMIX) return slot < 2;
    if (algorithm == RMSPROP) return slot > 0;
    return algorithm != ADAGRAD;
}

struct Buffers {
    float p[CHUNK], g[CHUNK], old[3][CHUNK], fresh[3][CHUNK], direction[CHUNK], compensation[CHUNK];
};

// New states and direction of n elements; see rules.advance.
void advance(const Settings& s, const Scalars& h, Buffers& b, int n) {
    float *p = b.p, *g = b.g, *d = b.direction;
    float *o0 = b.old[0], *o1 = b.old[1], *o2 = b.old[2], *n0 = b.fresh[0], *n1 = b.fresh[1], *n2 = b.fresh[2];
    switch (s.algorithm) {
    case ADAM:
        for (int i = 0; i < n; i++) {
            n0[i] = o0[i] * h.b1 + g[i] * h.c1;
            n1[i] = o1[i] * h.b2 + g[i] * g[i] * h.c2;
            d[i] = n0[i] * h.inv_bias1 / (std::sqrt(n1[i]) * h.inv_sqrt_bias2 + h.eps);
        }
        break;
    case ADEMAMIX:
        for (int i = 0; i < n; i++) {
            n0[i] = o0[i] * h.b1 + g[i] * h.c1;
            n1[i] = o1[i] * h.b3 + g[i] * h.c3;
            n2[i] = o2[i] * h.b2 + g[i] * g[i] * h.c2;
            d[i] = (n0[i] * h.inv_bias1 + n1[i] * h.alpha) / (std::sqrt(n2[i]) * h.inv_sqrt_bias2 + h.eps);
        }
        break;
    case LION:
        for (int i = 0; i < n; i++) {
            float c = o0[i] * h.b1 + g[i] * h.c1;
            d[i] = c != c ? c : float(c > 0.0f) - float(c < 0.0f);
            n0[i] = o0[i] * h.b2 + g[i] * h.c2;
        }
        break;
    case SGD:
        if (s.flags & MOMENTUM) {
            for (int i = 0; i < n; i++) n0[i] = std::fma(g[i], h.c1, o0[i] * h.b1);
            if (s.flags & NESTEROV) for (int i = 0; i < n; i++) d[i] = std::fma(n0[i], h.b2, g[i]);
            else std::memcpy(d, n0, n * sizeof(float));
        } else {
            std::memcpy(d, g, n * sizeof(float));
        }
        break;
    case RMSPROP: {
        float *average_old = s.flags & MOMENTUM ? o2 : o1, *average = s.flags & MOMENTUM ? n2 : n1;
        for (int i = 0; i < n; i++) n0[i] = o0[i] * h.b1 + g[i] * g[i] * h.c1;
        if (s.flags & CENTERED) {
            for (int i = 0; i < n; i++) {
                average[i] = average_old[i] * h.b1 + g[i] * h.c1;
                float spread = n0[i] - average[i] * average[i];
                d[i] = g[i] / (std::sqrt(spread < 0.0f ? 0.0f : spread) + h.eps);
            }
        } else {
            for (int i = 0; i < n; i++) d[i] = g[i] / (std::sqrt(n0[i]) + h.eps);
        }
        if (s.flags & MOMENTUM)
            for (int i = 0; i < n; i++) d[i] = n1[i] = o1[i] * h.b2 + d[i];
        break;
    }
    default:
        for (int i = 0; i < n; i++) {
            n0[i] = o0[i] + g[i] * g[i];
            d[i] = g[i] / (std::sqrt(n0[i]) + h.eps);
        }
    }
    if (s.decay_in_direction)
        for (int i = 0; i < n; i++) d[i] = d[i] + p[i] * h.dir_decay;
}

int states_of(const Settings& s) {
    if (s.algorithm == ADAM) return 2;
    if (s.algorithm == ADEMAMIX) return 3;
    if (s.algorithm == SGD) return s.flags & MOMENTUM ? 1 : 0;
    if (s.algorithm == RMSPROP) return 1 + ((s.flags & MOMENTUM) != 0) + ((s.flags & CENTERED) != 0);
    return 1;
}

// One chunk of one tensor. sums == nullptr: do the step with `scale`. Else only add |p|^2 and |update|^2 (LARS: |g|^2).
void chunk(const Settings& s, const Row& row, const Scalars& h, int64_t begin, float scale, double* sums) {
    Buffers b;
    int n = int(row.count - begin < CHUNK ? row.count - begin : CHUNK);
    int count = states_of(s);
    load(b.p, row.p, begin, n, s.p_dtype);
    load(b.g, row.g, begin, n, s.g_dtype);
    if (s.kahan) {
        load(b.compensation, row.compensation, begin, n, s.p_dtype);
        for (int i = 0; i < n; i++) b.p[i] = b.p[i] + b.compensation[i];
    }
    uint8_t drop[CHUNK];
    for (int i = 0; i < n; i++) drop[i] = s.skip_zeros && b.g[i] == 0.0f;
    if (sums && s.norm == LARS_TRUST) {
        double pp = 0, gg = 0;
        for (int i = 0; i < n; i++) {
            pp += double(b.p[i]) * b.p[i];
            gg += s.bits8 && !std::isfinite(b.g[i]) ? 0.0 : double(b.g[i]) * b.g[i];
        }
        sums[0] += pp; sums[1] += gg;
        return;
    }
    for (int k = 0; k < count; k++) {
        if (s.bits8)
            decode(b.old[k], reinterpret_cast<const uint8_t*>(row.state[k]) + begin,
                   reinterpret_cast<const float*>(row.absmax[k])[begin / CHUNK], s.maps[state_signed(s.algorithm, k)], n);
        else load(b.old[k], row.state[k], begin, n, F32);
    }
    if (s.norm == LARS_TRUST) for (int i = 0; i < n; i++) b.g[i] = std::fma(b.p[i], h.l2, b.g[i]) * scale;
    else if (!s.decay_in_direction && h.l2 != 0.0f) for (int i = 0; i < n; i++) b.g[i] = std::fma(b.p[i], h.l2, b.g[i]);
    advance(s, h, b, n);
    if (s.bits8)  // 8-bit codes cannot hold infinity or NaN: such an element is left alone, its block is not harmed
        for (int k = 0; k < count; k++)
            for (int i = 0; i < n; i++) drop[i] |= (bits_of(b.fresh[k][i]) & 0x7f800000) == 0x7f800000;
    if (sums) {
        double pp = 0, dd = 0;
        for (int i = 0; i < n; i++) {
            pp += double(b.p[i]) * b.p[i];
            dd += drop[i] ? 0.0 : double(b.direction[i]) * b.direction[i];
        }
        sums[0] += pp; sums[1] += dd;
        return;
    }
    float rate = s.norm == LARS_TRUST ? h.rate : h.rate * scale;
    for (int i = 0; i < n; i++) {
        float moved = std::fma(b.direction[i], -rate, b.p[i] * h.shrink);
        b.direction[i] = drop[i] ? b.p[i] : moved;
    }
    if (s.kahan) {
        store(b.direction, row.p, begin, n, s.p_dtype);
        load(b.p, row.p, begin, n, s.p_dtype);
        for (int i = 0; i < n; i++) b.p[i] = b.direction[i] - b.p[i];
        store(b.p, row.compensation, begin, n, s.p_dtype);
    } else if (s.stochastic) {
        store_stochastic(b.direction, row.p, begin, n, uint32_t(row.seed), uint32_t(h.step));
    } else {
        store(b.direction, row.p, begin, n, s.p_dtype);
    }
    for (int k = 0; k < count; k++) {
        for (int i = 0; i < n; i++) b.fresh[k][i] = drop[i] ? b.old[k][i] : b.fresh[k][i];
        if (s.bits8)
            reinterpret_cast<float*>(row.absmax[k])[begin / CHUNK] =
                encode(reinterpret_cast<uint8_t*>(row.state[k]) + begin, b.fresh[k], s.maps[state_signed(s.algorithm, k)], n);
        else store(b.fresh[k], row.state[k], begin, n, F32);
    }
}

// Same as rules.trust_scale.
float trust_scale(int kind, double p_norm, double other, const Scalars& h) {
    if (p_norm == 0.0 || other == 0.0) return 1.0f;
    if (kind == LARS_TRUST) return float(h.max_unorm * p_norm / (other + h.l2 * p_norm));
    double ratio = p_norm / other, capped = h.max_unorm * ratio;
    if (kind == CAP) return float(capped < 1.0 ? capped : 1.0);
    return float(h.max_unorm > 0.0f && capped < ratio ? capped : ratio);
}

}  // namespace

// table: [tensors] rows; scalars: [rows][16] floats that Row::scalars indexes. Returns 0, or 1 when out of memory.
KBIT_EXPORT(int32_t, kbit_optim_step)(const Settings* settings, const int64_t* table, int64_t tensors, const float* scalars) {
    const Settings& s = *settings;
    const Row* rows = reinterpret_cast<const Row*>(table);
    const Scalars* all = reinterpret_cast<const Scalars*>(scalars);
    Array<int64_t> first(tensors + 1);  // first chunk of each tensor
    Array<float> scale(tensors);
    if (!first.ok() || !scale.ok()) return 1;
    first[0] = 0;
    for (int64_t t = 0; t < tensors; t++) {
        first[t + 1] = first[t] + (rows[t].count + CHUNK - 1) / CHUNK;
        scale[t] = 1.0f;
    }
    const int64_t chunks = first[tensors];
    // Below some 100,000 elements waking a thread costs more than it saves.
    const int64_t threads = chunks < 400 ? 1 : s.threads;
    auto each = [&](int64_t from, int64_t to, auto visit) {
        int64_t low = 0, high = tensors - 1;  // the last tensor that begins at or before chunk `from`
        while (low < high) {
            int64_t middle = (low + high + 1) / 2;
            if (first[middle] <= from) low = middle;
            else high = middle - 1;
        }
        for (int64_t c = from; c < to; c++) {
            while (c >= first[low + 1]) low++;
            visit(low, (c - first[low]) * CHUNK, c);
        }
    };
    if (s.norm != NO_NORM) {
        Array<double> sums(2 * chunks);
        if (!sums.ok()) return 1;
        std::memset(sums.get(), 0, size_t(2 * chunks) * sizeof(double));
        parallel_for(chunks, GRAIN, threads, [&](int64_t from, int64_t to) {
            each(from, to, [&](int64_t t, int64_t begin, int64_t c) {
                chunk(s, rows[t], all[rows[t].scalars], begin, 1.0f, &sums[2 * c]);
            });
        });
        for (int64_t t = 0; t < tensors; t++) {
            double pp = 0, oo = 0;
            for (int64_t c = first[t]; c < first[t + 1]; c++) { pp += sums[2 * c]; oo += sums[2 * c + 1]; }
            scale[t] = trust_scale(s.norm, std::sqrt(pp), std::sqrt(oo), all[rows[t].scalars]);
        }
    }
    parallel_for(chunks, GRAIN, threads, [&](int64_t from, int64_t to) {
        each(from, to, [&](int64_t t, int64_t begin, int64_t) {
            chunk(s, rows[t], all[rows[t].scalars], begin, scale[t], nullptr);
        });
    });
    return 0;
}
