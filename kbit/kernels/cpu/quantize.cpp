// Quantizing, and decoding what has one byte a value: 4-bit codes, dynamic 8-bit codes, int8 rows.
//
// The definitions are in kbit/formats/blocks.py; every code and every decoded value equals its, to the bit. Threads take
// stretches of PIECE values, a multiple of every block size, or rows.

#include "dynamic_map.h"

namespace {

constexpr int64_t PIECE = 4096;  // the largest block size
constexpr float TINY_ABSMAX = 1e-38f;

inline bool finite(float x) { return (bits_of(x) & 0x7f800000) != 0x7f800000; }

// n values as floats: where they are, or converted into `buffer`.
const float* as_floats(const void* x, int64_t begin, int64_t n, int dtype, float* buffer) {
    if (dtype == F32) return static_cast<const float*>(x) + begin;
    load_floats(buffer, x, begin, n, dtype);
    return buffer;
}

// The largest magnitude; NaN is larger than all.
float largest(const float* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t a = bits_of(x[i]) & 0x7fffffff;
        most = a > most ? a : most;
    }
    return float_of(most);
}

struct FourBit {
    float midpoints[16];  // 15 midpoints between the sorted values, infinity
    uint8_t codes[16];    // codes in ascending order of value
};

// Packed codes of n values (n even) times `factor`: a code is the number of midpoints strictly below the product.
void pack_codes(const float* x, int64_t n, float factor, const FourBit& f, uint8_t* out) {
    int64_t i = 0;
#if defined(KBIT_AVX512)
    // A binary search in registers: the third and fourth comparison look their midpoint up by the rank so far.
    alignas(64) float third[16] = {}, fourth[16];
    alignas(64) int32_t codes[16];
    for (int r = 0; r < 16; r += 4) third[r] = f.midpoints[r + 1];
    for (int r = 0; r < 16; r++) fourth[r] = f.midpoints[r], codes[r] = f.codes[r];
    const __m512 m7 = _mm512_set1_ps(f.midpoints[7]), m3 = _mm512_set1_ps(f.midpoints[3]);
    const __m512 m11 = _mm512_set1_ps(f.midpoints[11]), t3 = _mm512_load_ps(third), t4 = _mm512_load_ps(fourth);
    const __m512i table = _mm512_load_si512(codes), one = _mm512_set1_epi32(1), two = _mm512_set1_epi32(2);
    const __m512i four = _mm512_set1_epi32(4), eight = _mm512_set1_epi32(8);
    const __m512 scale = _mm512_set1_ps(factor);
    for (; i + 16 <= n; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
        __mmask16 high = _mm512_cmp_ps_mask(v, m7, _CMP_GT_OQ);
        __m512i rank = _mm512_maskz_mov_epi32(high, eight);
        __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_mask_blend_ps(high, m3, m11), _CMP_GT_OQ);
        rank = _mm512_mask_or_epi32(rank, above, rank, four);
        above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(rank, t3), _CMP_GT_OQ);
        rank = _mm512_mask_or_epi32(rank, above, rank, two);
        above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(rank, t4), _CMP_GT_OQ);
        rank = _mm512_mask_or_epi32(rank, above, rank, one);
        __m512i code = _mm512_permutexvar_epi32(rank, table);
        // Neighbours lie in the halves of 64 bits: the even one goes to the high nibble.
        __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i / 2), _mm512_cvtepi64_epi8(pair));
    }
#endif
    for (; i < n; i += 64) {
        int32_t rank[64];
        int64_t count = n - i < 64 ? n - i : 64;
        for (int64_t j = 0; j < count; j++) {
            float v = x[i + j] * factor;
            int32_t below = 0;
            for (int m = 0; m < 15; m++) below += v > f.midpoints[m];
            rank[j] = below;
        }
        for (int64_t j = 0; j < count; j += 2)
            out[(i + j) / 2] = uint8_t(f.codes[rank[j]] << 4 | f.codes[rank[j + 1]]);
    }
}

// A short last block divides by absmax, where full ones multiply by its reciprocal.
void pack_short(const float* x, int64_t n, float absmax, const FourBit& f, uint8_t pad, uint8_t* out) {
    for (int64_t i = 0; i < n; i += 2) {
        uint8_t code[2] = {pad, pad};
        for (int64_t j = 0; j < (n - i < 2 ? n - i : 2); j++) {
            float v = x[i + j] / absmax;
            int below = 0;
            for (int m = 0; m < 15; m++) below += v > f.midpoints[m];
            code[j] = f.codes[below];
        }
        out[i / 2] = uint8_t(code[0] << 4 | code[1]);
    }
}

// int8_codes of blocks.py, for values no larger than absmax.
void row_codes(const float* x, float absmax, int8_t* codes, int64_t n) {
    float boost = absmax < 7.888609052210118e-31f ? 18446744073709551616.0f : 1.0f;
    float inverse = absmax > 0.0f ? 1.0f / (absmax * boost) * 127.0f : 0.0f;  // as torch divides a number by a tensor
    for (int64_t i = 0; i < n; i++) {
        float v = x[i] * boost * inverse;
        codes[i] = int8_t(int32_t((v + 12582912.0f) - 12582912.0f));  // to the nearest even
    }
}

// (code * absmax) * fp32(1 / 127)
void decode_row(const int8_t* codes, float absmax, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = float(codes[i]) * absmax * (1.0f / 127.0f);
}

}  // namespace

// x [count] -> packed codes [(count + 1) / 2] and absmax [ceil(count / block)].
KBIT_EXPORT(void, kbit_quantize_4bit)(const void* x, int32_t dtype, int64_t count, int64_t block, const float* midpoints,
                                      const uint8_t* codes, int32_t pad, uint8_t* out, float* absmax, int32_t threads) {
    FourBit f;
    std::memcpy(f.midpoints, midpoints, 15 * sizeof(float));
    f.midpoints[15] = float_of(0x7f800000);
    std::memcpy(f.codes, codes, 16);
    parallel_for((count + PIECE - 1) / PIECE, 16, threads, [&](int64_t from, int64_t to) {
        alignas(64) float buffer[PIECE];
        for (int64_t piece = from; piece < to; piece++) {
            int64_t begin = piece * PIECE, n = count - begin < PIECE ? count - begin : PIECE;
            const float* values = as_floats(x, begin, n, dtype, buffer);
            for (int64_t i = 0; i < n; i += block) {
                int64_t at = (begin + i) / block, size = n - i < block ? n - i : block;
                float most = largest(values + i, size);
                float floor = most < TINY_ABSMAX ? TINY_ABSMAX : most;
                uint8_t* to_codes = out + (begin + i) / 2;
                if (size == block) pack_codes(values + i, block, 1.0f / floor, f, to_codes);
                else pack_short(values + i, size, floor, f, uint8_t(pad), to_codes);
                // A short last block stores the guarded value, a full one the true one.
                absmax[at] = size == block ? most : floor;
            }
        }
    });
}

// x [count] -> codes [count] of the dynamic map and absmax [ceil(count / block)]. Returns 1, nothing being valid, where
// x is not finite.
KBIT_EXPORT(int32_t, kbit_quantize_dynamic)(const void* x, int32_t dtype, int64_t count, int64_t block, const Map* map,
                                            uint8_t* codes, float* absmax, int32_t threads) {
    std::atomic<int32_t> bad{0};
    const Map m = *map;
    const uint8_t zero = m.values[0] < 0 ? 127 : 0;
    parallel_for((count + PIECE - 1) / PIECE, 4, threads, [&](int64_t from, int64_t to) {
        alignas(64) float buffer[PIECE];
        for (int64_t piece = from; piece < to; piece++) {
            int64_t begin = piece * PIECE, n = count - begin < PIECE ? count - begin : PIECE;
            load_floats(buffer, x, begin, n, dtype);
            for (int64_t i = 0; i < n; i += block) {
                int64_t size = n - i < block ? n - i : block;
                float most = largest(buffer + i, size);
                uint8_t* out = codes + begin + i;
                absmax[(begin + i) / block] = most;
                if (!finite(most)) bad = 1;
                else if (most == 0.0f) std::memset(out, zero, size_t(size));
                else if (most < 1e-30f)  // the reciprocal may overflow
                    for (int64_t j = 0; j < size; j++) out[j] = nearest(buffer[i + j], most, m);
                else
                    for (int64_t j = 0; j < size; j += MAP_BLOCK) {
                        int part = int(size - j < MAP_BLOCK ? size - j : MAP_BLOCK);
                        alignas(64) float values[MAP_BLOCK];
                        std::memcpy(values, buffer + i + j, size_t(part) * sizeof(float));
                        encode_scaled(out + j, values, most, m, part);
                    }
            }
        }
    });
    return bad;
}

// The inverse. `offset`, if given, is added to every decoded value (double quantization).
KBIT_EXPORT(void, kbit_dequantize_dynamic)(const uint8_t* codes, const float* absmax, int64_t count, int64_t block,
                                           const Map* map, const float* offset, void* out, int32_t dtype,
                                           int32_t threads) {
    const Map m = *map;
    parallel_for((count + PIECE - 1) / PIECE, 16, threads, [&](int64_t from, int64_t to) {
        alignas(64) float buffer[PIECE];
        for (int64_t piece = from; piece < to; piece++) {
            int64_t begin = piece * PIECE, n = count - begin < PIECE ? count - begin : PIECE;
            for (int64_t i = 0; i < n; i += block)
                decode(buffer + i, codes + begin + i, absmax[(begin + i) / block], m, int(n - i < block ? n - i : block));
            if (offset)
                for (int64_t i = 0; i < n; i++) buffer[i] += *offset;
            store_floats(buffer, out, begin, n, dtype);
        }
    });
}

// x [rows, k] -> int8 codes and absmax [rows]. Returns 1, nothing being valid, where x is not finite.
KBIT_EXPORT(int32_t, kbit_quantize_int8)(const void* x, int32_t dtype, int64_t rows, int64_t k, int8_t* codes,
                                         float* absmax, int32_t threads) {
    std::atomic<int32_t> bad{0};
    int64_t grain = 16384 / (k > 0 ? k : 1) + 1;
    parallel_for(rows, grain, threads, [&](int64_t from, int64_t to) {
        alignas(64) float buffer[PIECE];
        for (int64_t row = from; row < to; row++) {
            float most = 0.0f;
            for (int64_t i = 0; i < k; i += PIECE) {
                int64_t n = k - i < PIECE ? k - i : PIECE;
                float part = largest(as_floats(x, row * k + i, n, dtype, buffer), n);
                most = bits_of(part) > bits_of(most) ? part : most;
            }
            absmax[row] = most;
            if (!finite(most)) {
                bad = 1;
                continue;
            }
            for (int64_t i = 0; i < k; i += PIECE) {
                int64_t n = k - i < PIECE ? k - i : PIECE;
                row_codes(as_floats(x, row * k + i, n, dtype, buffer), most, codes + row * k + i, n);
            }
        }
    });
    return bad;
}

// The inverse.
KBIT_EXPORT(void, kbit_dequantize_int8)(const int8_t* codes, const float* absmax, int64_t rows, int64_t k, void* out,
                                        int32_t dtype, int32_t threads) {
    int64_t grain = 16384 / (k > 0 ? k : 1) + 1;
    parallel_for(rows, grain, threads, [&](int64_t from, int64_t to) {
        alignas(64) float buffer[PIECE];
        for (int64_t row = from; row < to; row++)
            for (int64_t i = 0; i < k; i += PIECE) {
                int64_t n = k - i < PIECE ? k - i : PIECE, at = row * k + i;
                if (dtype == F32) {
                    decode_row(codes + at, absmax[row], static_cast<float*>(out) + at, n);
                    continue;
                }
                decode_row(codes + at, absmax[row], buffer, n);
                store_floats(buffer, out, at, n, dtype);
            }
    });
}
