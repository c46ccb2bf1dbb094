// What a call on a 4-bit weight W [N, K] is given: W with its scales, in one or two levels, and the tensors of the task.

#pragma once

#include "decode_4bit.h"
#include "dynamic_map.h"

namespace {

struct Weight {
    const uint8_t* codes;        // packed pairs in flat order, the even element in the high nibble
    const void* absmax;          // fp32 [B], or uint8 codes [B] of double quantization
    const float* nested_absmax;  // fp32 [ceil(B / 256)], or null
    const float* nested_offset;  // fp32 [1]
    const float* dynamic_map;    // fp32 [256]
    const float* codebook;       // fp32 [16]
    int64_t n, k, block_size;
};

struct Task {
    Weight w;
    const void* x;     // [M, K], rows x_stride elements apart; embedding: int64 indices [M]
    const void* bias;  // [n1 - n0] in x's dtype, or null
    void* out;         // product: [M, n1 - n0]; decode: [n1 - n0, k1 - k0]; embedding: [M, K]
    int64_t m, x_stride;
    int64_t n0, n1, k0, k1;  // the part of W that takes part
    int32_t dtype, threads;  // Dtype of x, bias and out
};

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// x in packed form, of the thread that calls; scales and decoded weights, of each thread.
thread_local Scratch packed_x, scratch;

// ---- scales ----

inline float scale_at(const Weight& w, int64_t block) {
    if (!w.nested_absmax) return static_cast<const float*>(w.absmax)[block];
    float product = w.dynamic_map[static_cast<const uint8_t*>(w.absmax)[block]] * w.nested_absmax[block >> 8];
    return product + w.nested_offset[0];
}

// `count` scales of one nested block.
inline void nested_scales(const Weight& w, const uint8_t* codes, int64_t count, float nested, float offset, float* out) {
    int64_t i = 0;
#if defined(KBIT_AVX512)
    for (; i < count; i += 16) {
        __mmask16 live = __mmask16(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
        __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(live, codes + i));
        __m512 product = _mm512_mul_ps(lookup<256>(w.dynamic_map, index), _mm512_set1_ps(nested));
        _mm512_mask_storeu_ps(out + i, live, _mm512_add_ps(product, _mm512_set1_ps(offset)));
    }
#endif
    for (; i < count; ++i) {
        float product = w.dynamic_map[codes[i]] * nested;
        out[i] = product + offset;
    }
}

// Scales of `count` pieces of `piece` weights (64, or 32) that begin at flat position `first`, zeros up to `padded`.
void piece_scales(const Weight& w, int64_t first, int64_t count, int64_t padded, int64_t piece, float* out) {
    int64_t block = first / w.block_size, each = w.block_size / piece;
    if (each == 1) {
        if (!w.nested_absmax) {
            std::memcpy(out, static_cast<const float*>(w.absmax) + block, size_t(count) * sizeof(float));
        } else {
            const uint8_t* codes = static_cast<const uint8_t*>(w.absmax);
            float offset = w.nested_offset[0];
            for (int64_t i = 0; i < count;) {
                float nested = w.nested_absmax[(block + i) >> 8];
                int64_t end = min_of(count, i + 256 - ((block + i) & 255));
                nested_scales(w, codes + block + i, end - i, nested, offset, out + i);
                i = end;
            }
        }
    } else {
        for (int64_t i = 0; i < count;) {
            float scale = scale_at(w, (first + i * piece) / w.block_size);
            int64_t end = min_of(count, i + each - ((first / piece + i) & (each - 1)));
            for (; i < end; ++i) out[i] = scale;
        }
    }
    for (int64_t i = count; i < padded; ++i) out[i] = 0.0f;
}

// A sum of row n of W for token m, with its bias, to its place in out.
void finish(const Task& t, int64_t m, int64_t n, float sum) {
    if (t.bias) sum += load_float(t.bias, n - t.n0, t.dtype);
    store_float(t.out, m * (t.n1 - t.n0) + n - t.n0, t.dtype, sum);
}

}  // namespace
