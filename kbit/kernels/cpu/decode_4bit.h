// Decoding 4-bit codes in registers, for the instruction set of this compilation (see common.h).
//
// A scale multiplies the 16 entries of the codebook once a block, and the products are rounded to the dtype in which the
// weight takes part; a table look-up then gives exactly the dequantized weight, with nothing left to do per element.
//
// A Lane is how a product walks along K: CHUNK weights (CHUNK / 2 bytes) are decoded into VECTORS vectors of LANES
// weights. Shifting a whole register brings one nibble of each word to its low bits, so vector j holds the weights
// j, j + VECTORS, j + 2 VECTORS ... of the chunk. Sums over k may take any order: the activations are packed alike.

#pragma once

#include "common.h"

namespace {

template <int R> inline float rounded(float x) {
    if (R == BF16) return from_bf16(to_bf16(x));
    if (R == F16) return from_f16(to_f16(x));
    return x;
}
inline float load_float(const void* p, int64_t i, int dtype) {
    if (dtype == F32) return static_cast<const float*>(p)[i];
    uint16_t h = static_cast<const uint16_t*>(p)[i];
    return dtype == BF16 ? from_bf16(h) : from_f16(h);
}
inline void store_float(void* p, int64_t i, int dtype, float x) {
    if (dtype == F32) static_cast<float*>(p)[i] = x;
    else static_cast<uint16_t*>(p)[i] = dtype == BF16 ? to_bf16(x) : to_f16(x);
}

// ---- lanes of plain C++: eight floats at a time, for the compiler to vectorize ----

template <int R> struct PlainLane {
    using Elem = float;
    struct Vec { float v[8]; };
    using Acc = Vec;
    using Codes = const uint8_t*;
    struct Table { float v[2][16]; };
    static constexpr int CHUNK = 64, VECTORS = 8, LANES = 8, MAX_N = 1;
    static constexpr bool FUSED = false;

    static Acc zero() { return Acc{}; }
    template <bool SMALL> static Codes load(const uint8_t* p) { return p; }
    // scales: one, or two where a block has 32 weights
    template <bool SMALL> static Table table(const float* codebook, const float* scales) {
        Table t;
        for (int i = 0; i < 16; ++i) t.v[0][i] = rounded<R>(codebook[i] * scales[0]);
        for (int i = 0; i < 16; ++i) t.v[1][i] = SMALL ? rounded<R>(codebook[i] * scales[1]) : t.v[0][i];
        return t;
    }
    template <bool SMALL, int J> static Vec decode(Codes c, const Table& t) {
        Vec w;
        for (int i = 0; i < 8; ++i) w.v[i] = t.v[i >> 2][(c[4 * i + J / 2] >> (J % 2 ? 0 : 4)) & 15];
        return w;
    }
    static Vec load_vec(const Elem* p) { Vec w; std::memcpy(&w, p, sizeof w); return w; }
    static void store_vec(Elem* p, const Vec& w) { std::memcpy(p, &w, sizeof w); }
    static Acc dot(Acc a, const Vec& w, const Vec& x) {
        for (int i = 0; i < 8; ++i) a.v[i] += w.v[i] * x.v[i];
        return a;
    }
    // The sums of four accumulators, added to out[0..3].
    static void add_sums(const Acc& a, const Acc& b, const Acc& c, const Acc& d, float* out) {
        out[0] += sum(a), out[1] += sum(b), out[2] += sum(c), out[3] += sum(d);
    }
    static float sum(const Acc& a) {
        return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
    }
    static Elem from_float(float x) { return x; }
};

#if defined(KBIT_AVX2)
inline float sum8(__m256 a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

inline __m256 round8(__m256 v, int r) {
    if (r == BF16) {  // to nearest even on the bits; scales and codebooks are finite
        __m256i u = _mm256_castps_si256(v);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        u = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        return _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(int(0xffff0000))));
    }
    return r == F16 ? _mm256_cvtph_ps(_mm256_cvtps_ph(v, 0)) : v;
}

// Eight floats: a table look-up is two permutations of eight entries and a blend by the code's highest bit.
template <int R> struct Avx2Lane {
    using Elem = float;
    using Vec = __m256;
    using Acc = __m256;
    using Codes = __m256i;
    struct Table { __m256 low, high, low2, high2; };
    static constexpr int CHUNK = 64, VECTORS = 8, LANES = 8, MAX_N = 2;
    static constexpr bool FUSED = true;

    static Acc zero() { return _mm256_setzero_ps(); }
    template <bool SMALL> static Codes load(const uint8_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    template <bool SMALL> static Table table(const float* codebook, const float* scales) {
        __m256 low = _mm256_loadu_ps(codebook), high = _mm256_loadu_ps(codebook + 8), s = _mm256_set1_ps(scales[0]);
        Table t;
        t.low = round8(_mm256_mul_ps(low, s), R);
        t.high = round8(_mm256_mul_ps(high, s), R);
        if (SMALL) {
            s = _mm256_set1_ps(scales[1]);
            t.low2 = round8(_mm256_mul_ps(low, s), R);
            t.high2 = round8(_mm256_mul_ps(high, s), R);
        }
        return t;
    }
    template <bool SMALL, int J> static Vec decode(Codes c, const Table& t) {
        constexpr int shift = 4 * (J ^ 1);
        __m256i index = _mm256_srli_epi32(c, shift);
        __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(c, 28 - shift));  // the code's highest bit as a sign
        __m256 w = _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), top);
        if (!SMALL) return w;
        __m256 w2 =
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low2, index), _mm256_permutevar8x32_ps(t.high2, index), top);
        return _mm256_blend_ps(w, w2, 0xf0);
    }
    static Vec load_vec(const Elem* p) { return _mm256_loadu_ps(p); }
    static void store_vec(Elem* p, Vec w) { _mm256_storeu_ps(p, w); }
    static Acc dot(Acc a, Vec w, Vec x) { return _mm256_fmadd_ps(w, x, a); }
    static float sum(Acc a) { return sum8(a); }
    static void add_sums(Acc a, Acc b, Acc c, Acc d, float* out) {
        __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
    }
    static Elem from_float(float x) { return x; }
};
#endif

#if defined(KBIT_AVX512)
inline float sum16(__m512 a) {
    return sum8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}

// Four registers become one whose quarters hold their partial sums, then each quarter is summed.
inline void add_sums16(__m512 a, __m512 b, __m512 c, __m512 d, float* out) {
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    __m128 sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}

inline __m512 round16(__m512 v, int r) {
    if (r == BF16) {
        __m512i u = _mm512_castps_si512(v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        return _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000))));
    }
    return r == F16 ? _mm512_cvtph_ps(_mm512_cvtps_ph(v, 0)) : v;
}

// The low and the high nibbles of 64 bytes as indices, each in its byte: shifting by whole bytes brings them to the low end
// of their words. Bit 4 chooses the table of the second block, to which the second half belongs (SMALL: of each half).
struct Nibbles {
    __m512i low, high;
    template <bool SMALL> static Nibbles load(const uint8_t* p) {
        constexpr int64_t second = 0x1010101010101010;
        const __m512i select = SMALL ? _mm512_set_epi64(second, second, 0, 0, second, second, 0, 0)
                                     : _mm512_set_epi64(second, second, second, second, 0, 0, 0, 0);
        const __m512i mask = _mm512_set1_epi8(15);
        __m512i c = _mm512_loadu_si512(p);
        return {_mm512_ternarylogic_epi32(c, mask, select, 0xea),  // c & mask | select
                _mm512_ternarylogic_epi32(_mm512_srli_epi16(c, 4), mask, select, 0xea)};
    }
};

// Sixteen floats: a permutation of two registers looks up in the tables of two blocks, which bit 4 of the index chooses.
template <int R> struct Avx512Lane {
    using Elem = float;
    using Vec = __m512;
    using Acc = __m512;
    using Codes = Nibbles;
    struct Table { __m512 a, b, c, d; };
    static constexpr int CHUNK = 128, VECTORS = 8, LANES = 16, MAX_N = 6;
    static constexpr bool FUSED = true;

    static Acc zero() { return _mm512_setzero_ps(); }
    template <bool SMALL> static Codes load(const uint8_t* p) { return Codes::load<SMALL>(p); }
    // scales: two, or four where a block has 32 weights
    template <bool SMALL> static Table table(const float* codebook, const float* scales) {
        __m512 values = _mm512_loadu_ps(codebook);
        Table t;
        t.a = round16(_mm512_mul_ps(values, _mm512_set1_ps(scales[0])), R);
        t.b = round16(_mm512_mul_ps(values, _mm512_set1_ps(scales[1])), R);
        if (SMALL) {
            t.c = round16(_mm512_mul_ps(values, _mm512_set1_ps(scales[2])), R);
            t.d = round16(_mm512_mul_ps(values, _mm512_set1_ps(scales[3])), R);
        }
        return t;
    }
    template <bool SMALL, int J> static Vec decode(const Codes& c, const Table& t) {
        __m512i index = _mm512_srli_epi32(J & 1 ? c.low : c.high, 8 * (J / 2));
        __m512 w = _mm512_permutex2var_ps(t.a, index, t.b);
        return SMALL ? _mm512_mask_blend_ps(0xff00, w, _mm512_permutex2var_ps(t.c, index, t.d)) : w;
    }
    static Vec load_vec(const Elem* p) { return _mm512_loadu_ps(p); }
    static void store_vec(Elem* p, Vec w) { _mm512_storeu_ps(p, w); }
    static Acc dot(Acc a, Vec w, Vec x) { return _mm512_fmadd_ps(w, x, a); }
    static float sum(Acc a) { return sum16(a); }
    static void add_sums(Acc a, Acc b, Acc c, Acc d, float* out) { add_sums16(a, b, c, d, out); }
    static Elem from_float(float x) { return x; }
};
#endif

#if defined(KBIT_AVX512BF16)
// Thirty-two bf16: the tables of two blocks fill one register, and pairs of products are summed in fp32.
struct Bf16Lane {
    using Elem = uint16_t;
    using Vec = __m512i;
    using Acc = __m512;
    using Codes = Nibbles;
    struct Table { __m512i a, b; };
    static constexpr int CHUNK = 128, VECTORS = 4, LANES = 32, MAX_N = 6;
    static constexpr bool FUSED = true;

    static Acc zero() { return _mm512_setzero_ps(); }
    template <bool SMALL> static Codes load(const uint8_t* p) { return Codes::load<SMALL>(p); }
    static __m512i pair(__m512 values, const float* scales) {
        return (__m512i)_mm512_cvtne2ps_pbh(
            _mm512_mul_ps(values, _mm512_set1_ps(scales[1])), _mm512_mul_ps(values, _mm512_set1_ps(scales[0])));
    }
    template <bool SMALL> static Table table(const float* codebook, const float* scales) {
        __m512 values = _mm512_loadu_ps(codebook);
        Table t;
        t.a = pair(values, scales);
        if (SMALL) t.b = pair(values, scales + 2);
        return t;
    }
    template <bool SMALL, int J> static Vec decode(const Codes& c, const Table& t) {
        __m512i index = _mm512_srli_epi16(J & 1 ? c.low : c.high, 8 * (J / 2));
        if (!SMALL) return _mm512_permutexvar_epi16(index, t.a);
        return _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(index, t.a), 0xffff0000u, index, t.b);
    }
    static Vec load_vec(const Elem* p) { return _mm512_loadu_si512(p); }
    static void store_vec(Elem* p, Vec w) { _mm512_storeu_si512(p, w); }
    static Acc dot(Acc a, Vec w, Vec x) { return _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)x); }
    static float sum(Acc a) { return sum16(a); }
    static void add_sums(Acc a, Acc b, Acc c, Acc d, float* out) { add_sums16(a, b, c, d, out); }
    static Elem from_float(float x) { return to_bf16(x); }
};
#endif

#if defined(KBIT_AVX512)
template <int R> using FloatLane = Avx512Lane<R>;
#elif defined(KBIT_AVX2)
template <int R> using FloatLane = Avx2Lane<R>;
#else
template <int R> using FloatLane = PlainLane<R>;
#endif

// ---- natural order: a run of weights of the flat order, decoded into memory ----

template <int D> struct OutElem { using type = uint16_t; };
template <> struct OutElem<F32> { using type = float; };

// The 16 entries of the codebook times a scale, rounded to dtype D.
template <int D> inline void scaled_table(const float* codebook, float scale, typename OutElem<D>::type* table) {
    for (int i = 0; i < 16; ++i) store_float(table, i, D, codebook[i] * scale);
}

#if defined(KBIT_AVX512)
inline __m512i words16(__m512 v, int dtype) {  // sixteen 16-bit floats, twice
    __m256i h = dtype == F16 ? _mm512_cvtps_ph(v, 0)
                             : _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(round16(v, BF16)), 16));
    return _mm512_broadcast_i64x4(h);
}
#endif

// `count` weights of one block from flat position `first` on, to out. Whole vectors first, the rest one by one.
template <int D, class T = typename OutElem<D>::type>
inline void look_up(const uint8_t* codes, int64_t first, int64_t count, const float* codebook, float scale, T* out) {
    int64_t i = 0;
    if (first & 1 && count > 0) {
        store_float(out, i++, D, codebook[codes[first >> 1] & 15] * scale);
    }
    const uint8_t* p = codes + ((first + i) >> 1);
#if defined(KBIT_AVX512)
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale));
    if constexpr (D != F32) {
        const __m512i values = words16(scaled, D);
        const __m512i spread = _mm512_set_epi64(0x0007000700070007, 0x0006000600060006, 0x0005000500050005,
                                                0x0004000400040004, 0x0003000300030003, 0x0002000200020002,
                                                0x0001000100010001, 0);
        const __m512i shift = _mm512_set1_epi64(0x0008000c00000004);
        for (; i + 32 <= count; i += 32, p += 16) {
            __m512i c = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
            c = _mm512_srlv_epi16(_mm512_permutexvar_epi16(spread, c), shift);
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(c, values));  // an index has five bits
        }
    } else {
        const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const __m512i shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
        for (; i + 16 <= count; i += 16, p += 8) {
            __m512i c = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
            c = _mm512_srlv_epi32(_mm512_permutexvar_epi32(spread, c), shift);
            _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(c, scaled));
        }
    }
#elif defined(KBIT_AVX2)
    if constexpr (D != F32) {  // low and high bytes of the table apart: a byte shuffle looks up 16 entries
        alignas(32) uint16_t table[16];
        scaled_table<D>(codebook, scale, table);
        const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
        const __m256i low_bytes = _mm256_and_si256(words, _mm256_set1_epi16(255));
        const __m256i high_bytes = _mm256_srli_epi16(words, 8);
        const __m128i low =
            _mm_packus_epi16(_mm256_castsi256_si128(low_bytes), _mm256_extracti128_si256(low_bytes, 1));
        const __m128i high =
            _mm_packus_epi16(_mm256_castsi256_si128(high_bytes), _mm256_extracti128_si256(high_bytes, 1));
        const __m128i mask = _mm_set1_epi8(15);
        for (; i + 16 <= count; i += 16, p += 8) {
            __m128i c = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
            __m128i index = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(c, 4), mask), _mm_and_si128(c, mask));
            __m128i a = _mm_shuffle_epi8(low, index), b = _mm_shuffle_epi8(high, index);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_unpacklo_epi8(a, b));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 8), _mm_unpackhi_epi8(a, b));
        }
    } else {
        const __m256 s = _mm256_set1_ps(scale);
        const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(codebook), s);
        const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), s);
        const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        for (; i + 8 <= count; i += 8, p += 4) {
            int32_t word;
            std::memcpy(&word, p, 4);
            __m256i c = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift);
            __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(c, 28));
            _mm256_storeu_ps(
                out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, c), _mm256_permutevar8x32_ps(high, c), top));
        }
    }
#endif
    if (i == count) return;
    T table[16];
    scaled_table<D>(codebook, scale, table);
    for (; i + 2 <= count; i += 2, ++p) {
        out[i] = table[*p >> 4];
        out[i + 1] = table[*p & 15];
    }
    if (i < count) out[i] = table[*p >> 4];
}

}  // namespace
