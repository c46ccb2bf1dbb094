// One optimizer step over many tensors on the CPU. The mathematics is kbit/optim/rules.py, operation for operation:
// compiled without contraction and with std::fma where torch fuses, so results equal the plain torch path to the bit.
//
// Work is cut into chunks of 256 elements, which is also the block of 8-bit states: a chunk is decoded into small
// arrays that stay in the L1 cache, advanced with vector instructions, and encoded again. Threads take ranges of the
// chunks of all tensors.

#include "common.h"

namespace {

constexpr int CHUNK = 256;
constexpr int64_t GRAIN = 256;  // chunks that a thread takes at once
constexpr int COLUMNS = 16;   // int64 columns of a table row, see struct Row
constexpr int SCALARS = 16;   // floats of a scalars row, see kbit.optim.rules.Scalars
constexpr float SMALLEST = 1.17549435e-38f;

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

// The tables of one 8-bit map. `rank` gives, for a bin of float bit patterns that holds at most one midpoint, the
// number of midpoints below the bin; `midpoints[rank]` then decides (midpoints[255] is infinity).
//
// `lines` serves AVX-512: for each of 16 slots (7 decades are used) slope, offset and bound of the line that gives a
// magnitude's rank, half a rank low; `steps` the midpoints between magnitudes of rank r and r + 1, [256].
struct Map {
    const float* values;
    const float* midpoints;
    const uint8_t* rank;
    const float* lines;
    const float* steps;
};

struct Settings {
    int32_t algorithm, flags, decay_in_direction, norm, bits8, skip_zeros, p_dtype, g_dtype, stochastic, kahan, threads;
    int32_t bin_offset, bin_first, bins;  // bin of |x|: ((bits + bin_offset) >> 16) - bin_first, clamped to [0, bins)
    Map maps[2];                          // unsigned, signed
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

#if defined(KBIT_AVX512)
// table[index] for 16 indices below 128 or 256: permutes are several times faster than gathers.
template <int SIZE> inline __m512 lookup(const float* table, __m512i index) {
    __m512 part[SIZE / 32];
    for (int k = 0; k < SIZE / 32; k++)
        part[k] = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32 * k), index, _mm512_loadu_ps(table + 32 * k + 16));
    __mmask16 bit = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    for (int k = 0; k < SIZE / 64; k++) part[k] = _mm512_mask_blend_ps(bit, part[2 * k], part[2 * k + 1]);
    bit = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    for (int k = 0; k < SIZE / 128; k++) part[k] = _mm512_mask_blend_ps(bit, part[2 * k], part[2 * k + 1]);
    if (SIZE == 256) part[0] = _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(128)), part[0], part[1]);
    return part[0];
}

void decode(float* out, const uint8_t* codes, float absmax, const Map& map, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(lookup<256>(map.values, index), _mm512_set1_ps(absmax)));
    }
    for (; i < n; i++) out[i] = map.values[codes[i]] * absmax;
}

// Codes of 16 values; a bit of the result for each that is so near a midpoint that it must be settled.
template <bool SIGNED> inline __mmask16 encode16(uint8_t* codes, __m512 x, __m512 inverse, const Map& map) {
    __m512 a = _mm512_mul_ps(_mm512_abs_ps(x), inverse);
    // Float bits are nearly a logarithm; the origin never puts a number into too high a decade.
    __m512i bits = _mm512_sub_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(870201351));
    bits = _mm512_max_epi32(bits, _mm512_setzero_si512());
    __m512 decades = _mm512_mul_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(9864.0f / 274877906944.0f));
    __m512i decade = _mm512_min_epi32(_mm512_cvttps_epi32(decades), _mm512_set1_epi32(6));
    __m512 slope = _mm512_permutexvar_ps(decade, _mm512_loadu_ps(map.lines));
    __m512 offset = _mm512_permutexvar_ps(decade, _mm512_loadu_ps(map.lines + 16));
    __m512 bound = _mm512_permutexvar_ps(decade, _mm512_loadu_ps(map.lines + 32));
    __m512i rank = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_fmadd_ps(a, slope, offset), bound));
    __m512 margin = _mm512_sub_ps(a, lookup<SIGNED ? 128 : 256>(map.steps, rank));
    __mmask16 above = _mm512_cmp_ps_mask(margin, _mm512_setzero_ps(), _CMP_GT_OQ);
    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1));
    if (SIGNED) {
        __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
        __m512i zero = _mm512_set1_epi32(127);
        __m512i down = _mm512_max_epi32(_mm512_sub_epi32(zero, rank), _mm512_setzero_si512());
        rank = _mm512_mask_blend_epi32(negative, _mm512_add_epi32(zero, rank), down);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(rank));
    return _mm512_cmp_ps_mask(_mm512_abs_ps(margin), _mm512_mul_ps(a, _mm512_set1_ps(1e-6f)), _CMP_LE_OQ);
}
#else
void decode(float* out, const uint8_t* codes, float absmax, const Map& map, int n) {
    for (int i = 0; i < n; i++) out[i] = map.values[codes[i]];
    for (int i = 0; i < n; i++) out[i] *= absmax;
}
#endif

// The definition: the code whose decoded value is nearest, the lower one on a tie.
uint8_t nearest(float x, float absmax, const Map& map, const Settings& s) {
    float scaled = x / absmax;
    uint32_t u = bits_of(scaled);
    int bin = int(((u & 0x7fffffff) + uint32_t(s.bin_offset)) >> 16) - s.bin_first;
    bin = bin < 0 ? 0 : bin >= s.bins ? s.bins - 1 : bin;
    int rank = map.rank[bin + (u >> 31) * s.bins];
    rank += scaled > map.midpoints[rank];
    int lower = rank > 0 ? rank - 1 : 0, upper = rank < 255 ? rank + 1 : 255;
    float distance = std::fabs(x - map.values[rank] * absmax);
    int best = std::fabs(x - map.values[upper] * absmax) < distance ? upper : rank;
    if (std::fabs(x - map.values[lower] * absmax) <= distance) best = lower;
    return uint8_t(best);
}

float encode(uint8_t* codes, float* x, const Map& map, const Settings& s, int n) {
    uint32_t largest = 0;
#if defined(KBIT_AVX512)
    for (int i = n; i % 16; i++) x[i] = 0.0f;
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) {
        __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + i));
        __m512i a = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
        __mmask16 normal = _mm512_cmpge_epi32_mask(a, _mm512_set1_epi32(0x00800000));
        _mm512_storeu_ps(x + i, _mm512_castsi512_ps(_mm512_maskz_mov_epi32(normal, bits)));
        most = _mm512_max_epi32(most, _mm512_maskz_mov_epi32(normal, a));
    }
    largest = uint32_t(_mm512_reduce_max_epi32(most));
#else
    for (int i = 0; i < n; i++) {
        uint32_t a = bits_of(x[i]) & 0x7fffffff;
        x[i] = a < 0x00800000 ? 0.0f : x[i];
        a = a < 0x00800000 ? 0 : a;
        largest = a > largest ? a : largest;
    }
#endif
    if (largest == 0) {
        std::memset(codes, map.values[0] < 0 ? 127 : 0, n);
        return 0.0f;
    }
    float absmax = float_of(largest), inverse = 1.0f / absmax;
#if defined(KBIT_AVX512)
    uint8_t padded[CHUNK];
    for (int i = 0; i < n; i += 16) {
        __m512 values = _mm512_loadu_ps(x + i), factor = _mm512_set1_ps(inverse);
        unsigned settle = map.values[0] < 0 ? encode16<true>(padded + i, values, factor, map)
                                            : encode16<false>(padded + i, values, factor, map);
        // Products and midpoints are a few units in the last place off: what is near one is settled by the definition.
        for (; settle; settle &= settle - 1) {
            int k = i + __builtin_ctz(settle);
            if (x[k] != 0.0f) padded[k] = nearest(x[k], absmax, map, s);
        }
    }
    std::memcpy(codes, padded, n);
#else
    float scaled[CHUNK], margin[CHUNK];
    int32_t bin[CHUNK];
    for (int i = 0; i < n; i++) {
        scaled[i] = x[i] * inverse;
        uint32_t u = bits_of(scaled[i]);
        int b = int(((u & 0x7fffffff) + uint32_t(s.bin_offset)) >> 16) - s.bin_first;
        b = b < 0 ? 0 : b;
        b = b >= s.bins ? s.bins - 1 : b;
        bin[i] = b + int(u >> 31) * s.bins;
    }
    for (int i = 0; i < n; i++) {
        int rank = map.rank[bin[i]];
        margin[i] = scaled[i] - map.midpoints[rank];
        codes[i] = uint8_t(rank + (margin[i] > 0.0f));
    }
    // The product above is a few units in the last place off, and so are midpoints: whatever is near one is settled.
    uint32_t near = 0;
    for (int i = 0; i < n; i++) near |= std::fabs(margin[i]) <= 1e-6f * std::fabs(scaled[i]);
    if (near)
        for (int i = 0; i < n; i++)
            if (std::fabs(margin[i]) <= 1e-6f * std::fabs(scaled[i])) codes[i] = nearest(x[i], absmax, map, s);
#endif
    return absmax;
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
                encode(reinterpret_cast<uint8_t*>(row.state[k]) + begin, b.fresh[k], s.maps[state_signed(s.algorithm, k)], s, n);
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
