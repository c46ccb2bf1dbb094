// Products of a 4-bit weight W with few tokens: W is decoded in registers, and meets all tokens there.

#pragma once

#include "task_4bit.h"

namespace {

// R rows of W times MT rows of packed x, W decoded in registers.
template <class L, bool SMALL, int R, int MT> struct Fused {
    template <int J> static inline void vector(typename L::Acc (&acc)[R][MT], const typename L::Codes (&codes)[R],
                                               const typename L::Table (&tables)[R], const typename L::Elem* x,
                                               int64_t ldx) {
        if constexpr (MT == 1) {
            typename L::Vec v = L::load_vec(x + J * L::LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                acc[r][0] = L::dot(acc[r][0], L::template decode<SMALL, J>(codes[r], tables[r]), v);
        } else {
            typename L::Vec w[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) w[r] = L::template decode<SMALL, J>(codes[r], tables[r]);
#pragma GCC unroll 8
            for (int m = 0; m < MT; ++m) {
                typename L::Vec v = L::load_vec(x + m * ldx + J * L::LANES);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) acc[r][m] = L::dot(acc[r][m], w[r], v);
            }
        }
    }

    static inline void chunk(typename L::Acc (&acc)[R][MT], const uint8_t* const (&p)[R], const float* codebook,
                             const float* scales, int64_t ld_scales, const typename L::Elem* x, int64_t ldx) {
        typename L::Codes codes[R];
        typename L::Table tables[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            codes[r] = L::template load<SMALL>(p[r]);
            tables[r] = L::template table<SMALL>(codebook, scales + r * ld_scales);
        }
        vector<0>(acc, codes, tables, x, ldx);
        vector<1>(acc, codes, tables, x, ldx);
        vector<2>(acc, codes, tables, x, ldx);
        vector<3>(acc, codes, tables, x, ldx);
        if constexpr (L::VECTORS == 8) {
            vector<4>(acc, codes, tables, x, ldx);
            vector<5>(acc, codes, tables, x, ldx);
            vector<6>(acc, codes, tables, x, ldx);
            vector<7>(acc, codes, tables, x, ldx);
        }
    }

    // rows: R consecutive rows of codes from `codes`; sums go to out[r * MT + m].
    static void run(const uint8_t* codes, int64_t row_bytes, const float* codebook, const float* scales,
                    int64_t ld_scales, const typename L::Elem* x, int64_t ldx, float* out, const uint8_t* end) {
        typename L::Acc acc[R][MT];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < MT; ++m) acc[r][m] = L::zero();
        constexpr int BYTES = L::CHUNK / 2, PER = L::CHUNK / (SMALL ? 32 : 64);
        int64_t whole = row_bytes / BYTES;
        const uint8_t* p[R];
        for (int r = 0; r < R; ++r) p[r] = codes + r * row_bytes;
        // The same place in the next rows: streams that jump from row to row are beyond the hardware's prefetcher.
        int64_t ahead = codes + 2 * R * row_bytes <= end ? R * row_bytes : 0;
        for (int64_t c = 0; c < whole; ++c) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(p[r] + ahead, 0, 2);
            chunk(acc, p, codebook, scales + c * PER, ld_scales, x + c * L::CHUNK, ldx);
            for (int r = 0; r < R; ++r) p[r] += BYTES;
        }
        if (row_bytes % BYTES) {
            uint8_t tail[R][BYTES] = {};
            for (int r = 0; r < R; ++r) {
                std::memcpy(tail[r], p[r], size_t(row_bytes % BYTES));
                p[r] = tail[r];
            }
            chunk(acc, p, codebook, scales + whole * PER, ld_scales, x + whole * L::CHUNK, ldx);
        }
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < MT; ++m) out[r * MT + m] = L::sum(acc[r][m]);
    }
};

template <class L, bool SMALL, int R, int MT>
bool fused_rows(const Task& t, const typename L::Elem* x, int64_t ldx, int64_t n0, int64_t n1) {
    constexpr int64_t PIECE = SMALL ? 32 : 64;
    int64_t row_bytes = t.w.k / 2, pieces = t.w.k / PIECE, ld = ldx / PIECE;
    float* scales = static_cast<float*>(scratch.get(ld * R * int64_t(sizeof(float))));
    if (!scales) return false;
    float sums[R * MT];
    const uint8_t* end = t.w.codes + t.w.n * row_bytes;
    for (int64_t n = n0; n < n1;) {
        const uint8_t* codes = t.w.codes + n * row_bytes;
        if (n + R <= n1) {
            if (pieces == ld) piece_scales(t.w, n * t.w.k, R * ld, R * ld, PIECE, scales);
            else
                for (int r = 0; r < R; ++r) piece_scales(t.w, (n + r) * t.w.k, pieces, ld, PIECE, scales + r * ld);
            Fused<L, SMALL, R, MT>::run(codes, row_bytes, t.w.codebook, scales, ld, x, ldx, sums, end);
            for (int r = 0; r < R; ++r)
                for (int m = 0; m < MT; ++m) finish(t, m, n + r, sums[r * MT + m]);
            n += R;
        } else {
            piece_scales(t.w, n * t.w.k, pieces, ld, PIECE, scales);
            Fused<L, SMALL, 1, MT>::run(codes, row_bytes, t.w.codebook, scales, ld, x, ldx, sums, end);
            for (int m = 0; m < MT; ++m) finish(t, m, n, sums[m]);
            n += 1;
        }
    }
    return true;
}

// Few tokens, W decoded in registers.
template <class L, bool SMALL>
bool rows_of(const Task& t, const typename L::Elem* x, int64_t ldx, int64_t n0, int64_t n1) {
    constexpr int R = sizeof(typename L::Elem) == 2 ? 4 : 2;  // rows at once; more would need registers that fp32 has not
    switch (t.m) {
        case 1: return fused_rows<L, SMALL, 4, 1>(t, x, ldx, n0, n1);
        case 2: return fused_rows<L, SMALL, 4, 2>(t, x, ldx, n0, n1);
        case 3: return fused_rows<L, SMALL, R, 3>(t, x, ldx, n0, n1);
        case 4: return fused_rows<L, SMALL, R, 4>(t, x, ldx, n0, n1);
    }
    if constexpr (sizeof(typename L::Elem) == 2) {  // more rows of fp32 would leave the L1 cache
        switch (t.m) {
            case 5: return fused_rows<L, SMALL, 4, 5>(t, x, ldx, n0, n1);
            case 6: return fused_rows<L, SMALL, 3, 6>(t, x, ldx, n0, n1);
            case 7: return fused_rows<L, SMALL, 3, 7>(t, x, ldx, n0, n1);
            default: return fused_rows<L, SMALL, 3, 8>(t, x, ldx, n0, n1);
        }
    }
    return false;
}

}  // namespace
