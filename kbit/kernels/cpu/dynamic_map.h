// The dynamic 8-bit map (optimizer states, block scales): decoding, and the nearest code of a value.

#pragma once

#include "common.h"

namespace {

constexpr int MAP_BLOCK = 256;  // values that are coded at once

// Bin of |x|: ((bits + BIN_OFFSET) >> 16) - BIN_FIRST, clamped to [0, BINS). Numbers of kbit/kernels/cpu/dynamic.py.
constexpr uint32_t BIN_OFFSET = 0x5A5B;
constexpr int BIN_FIRST = 13350, BINS = 2907;

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

#if defined(KBIT_AVX512)
// table[index] for 16 indices below 128 or 256: permutes are several times faster than gathers.
template <int SIZE> __attribute__((always_inline)) inline __m512 lookup(const float* table, __m512i index) {
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

inline void decode(float* out, const uint8_t* codes, float absmax, const Map& map, int n) {
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
inline void decode(float* out, const uint8_t* codes, float absmax, const Map& map, int n) {
    for (int i = 0; i < n; i++) out[i] = map.values[codes[i]];
    for (int i = 0; i < n; i++) out[i] *= absmax;
}
#endif

// The definition: the code whose decoded value is nearest, the lower one on a tie.
inline uint8_t nearest(float x, float absmax, const Map& map) {
    float scaled = x / absmax;
    uint32_t u = bits_of(scaled);
    int bin = int(((u & 0x7fffffff) + BIN_OFFSET) >> 16) - BIN_FIRST;
    bin = bin < 0 ? 0 : bin >= BINS ? BINS - 1 : bin;
    int rank = map.rank[bin + (u >> 31) * BINS];
    rank += scaled > map.midpoints[rank];
    int lower = rank > 0 ? rank - 1 : 0, upper = rank < 255 ? rank + 1 : 255;
    float distance = std::fabs(x - map.values[rank] * absmax);
    int best = std::fabs(x - map.values[lower] * absmax) <= distance ? lower : rank;
    if (std::fabs(x - map.values[upper] * absmax) < distance) best = upper;  // last: at either end lower or upper is rank
    return uint8_t(best);
}

// Codes of up to MAP_BLOCK finite values under an absmax that is no less than any of them and has a finite reciprocal.
// x has room for a multiple of 16, which is written to.
inline void encode_scaled(uint8_t* codes, float* x, float absmax, const Map& map, int n) {
    float inverse = 1.0f / absmax;
#if defined(KBIT_AVX512)
    for (int i = n; i % 16; i++) x[i] = 0.0f;
    uint8_t padded[MAP_BLOCK];
    for (int i = 0; i < n; i += 16) {
        __m512 values = _mm512_loadu_ps(x + i), factor = _mm512_set1_ps(inverse);
        unsigned settle = map.values[0] < 0 ? encode16<true>(padded + i, values, factor, map)
                                            : encode16<false>(padded + i, values, factor, map);
        // Products and midpoints are a few units in the last place off: what is near one is settled by the definition.
        for (; settle; settle &= settle - 1) {
            int k = i + __builtin_ctz(settle);
            if (x[k] != 0.0f) padded[k] = nearest(x[k], absmax, map);
        }
    }
    std::memcpy(codes, padded, n);
#else
    float scaled[MAP_BLOCK], margin[MAP_BLOCK];
    int32_t bin[MAP_BLOCK];
    for (int i = 0; i < n; i++) {
        scaled[i] = x[i] * inverse;
        uint32_t u = bits_of(scaled[i]);
        int b = int(((u & 0x7fffffff) + BIN_OFFSET) >> 16) - BIN_FIRST;
        b = b < 0 ? 0 : b;
        b = b >= BINS ? BINS - 1 : b;
        bin[i] = b + int(u >> 31) * BINS;
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
            if (std::fabs(margin[i]) <= 1e-6f * std::fabs(scaled[i])) codes[i] = nearest(x[i], absmax, map);
#endif
}

// Codes of an optimizer state of up to MAP_BLOCK values and their absmax. Subnormal values count as zero, in x too.
// Under the unsigned map a positive value has the smallest positive code at least, see kbit/optim/state.py.
inline float encode(uint8_t* codes, float* x, const Map& map, int n) {
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
    float absmax = float_of(largest);
    encode_scaled(codes, x, absmax, map, n);
    if (map.values[0] == 0.0f)
        for (int i = 0; i < n; i++) codes[i] |= uint8_t((codes[i] == 0) & (x[i] > 0.0f));
    return absmax;
}

}  // namespace
