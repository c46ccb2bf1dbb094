// Products with a 4-bit weight W [N, K] on the CPU, and the decoding of any rectangle of W.
//
// kbit_linear_4bit     x [M, K] -> out [M, rows of W], for one W or several: W is decoded in registers (few tokens), or a
//                      strip of rows at a time into the L2 cache (more tokens). Sums are fp32; W is rounded to x's dtype
//                      first, as in the plain torch path. A row's sum is always taken in the same order: results do not
//                      depend on threads, nor on the other W.
// kbit_decode_4bit     W[n0:n1, k0:k1] -> a dense buffer, for products that a matrix library does, and for dequantizing.
// kbit_embedding_4bit  rows of W by index -> a dense buffer.

#include "decode_4bit.h"
#include "dynamic_map.h"
#include "outer_4bit.h"

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

// ---- activations ----

// x in the order in which a Lane decodes weights: vector j of a chunk holds elements j, j + VECTORS, ...; zeros behind K.
template <class L> void pack_row(const void* x, int64_t row, const Task& t, int64_t padded, typename L::Elem* out) {
    int64_t k = t.w.k, base = row * t.x_stride;
    int64_t whole = k / L::CHUNK * L::CHUNK;
    for (int64_t c = 0; c < whole; c += L::CHUNK) {
        if constexpr (sizeof(typename L::Elem) == 2) {
            const uint16_t* p = static_cast<const uint16_t*>(x) + base + c;
            for (int j = 0; j < L::VECTORS; ++j)
                for (int i = 0; i < L::LANES; ++i) out[c + j * L::LANES + i] = p[i * L::VECTORS + j];
        } else if (t.dtype == F32) {
            const float* p = static_cast<const float*>(x) + base + c;
            for (int j = 0; j < L::VECTORS; ++j)
                for (int i = 0; i < L::LANES; ++i) out[c + j * L::LANES + i] = p[i * L::VECTORS + j];
        } else {
            for (int j = 0; j < L::VECTORS; ++j)
                for (int i = 0; i < L::LANES; ++i)
                    out[c + j * L::LANES + i] = load_float(x, base + c + i * L::VECTORS + j, t.dtype);
        }
    }
    for (int64_t e = whole; e < padded; ++e) {  // e: position in the packed row
        int64_t in = e - whole, k_in = whole + (in % L::LANES) * L::VECTORS + in / L::LANES;
        out[e] = k_in < k ? L::from_float(load_float(x, base + k_in, t.dtype)) : typename L::Elem(0);
    }
}

// ---- products ----

// R rows of W times MT rows of packed x, W decoded in registers.
template <class L, bool SMALL, int R, int MT> struct Fused {
    typename L::Acc acc[R][MT];

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

void finish(const Task& t, int64_t m, int64_t n, float sum) {
    if (t.bias) sum += load_float(t.bias, n - t.n0, t.dtype);
    store_float(t.out, m * (t.n1 - t.n0) + n - t.n0, t.dtype, sum);
}

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

template <class L, bool SMALL, int J> inline void decode_vectors(typename L::Codes c, const typename L::Table& t,
                                                                 typename L::Elem* out) {
    L::store_vec(out + J * L::LANES, L::template decode<SMALL, J>(c, t));
    if constexpr (J + 1 < L::VECTORS) decode_vectors<L, SMALL, J + 1>(c, t, out);
}

// One row of W in packed order, whole chunks.
template <class L, bool SMALL>
void decode_row(const uint8_t* codes, int64_t bytes, const float* codebook, const float* scales,
                typename L::Elem* out) {
    constexpr int BYTES = L::CHUNK / 2, PER = L::CHUNK / (SMALL ? 32 : 64);
    int64_t whole = bytes / BYTES, c = 0;
    for (; c < whole; ++c)
        decode_vectors<L, SMALL, 0>(L::template load<SMALL>(codes + c * BYTES), L::template table<SMALL>(codebook, scales + c * PER),
                                    out + c * L::CHUNK);
    if (bytes % BYTES) {
        uint8_t tail[BYTES] = {};
        std::memcpy(tail, codes + c * BYTES, size_t(bytes % BYTES));
        decode_vectors<L, SMALL, 0>(L::template load<SMALL>(tail), L::template table<SMALL>(codebook, scales + c * PER),
                                    out + c * L::CHUNK);
    }
}

// NT decoded rows times MT packed rows over `count` elements; adds to sums[n * ld + m].
//
// ahead, where not null: codes of the same rows of W that are decoded next, row_bytes apart. They are fetched meanwhile.
template <class L, int NT, int MT>
void dot_tile(const typename L::Elem* w, const typename L::Elem* x, int64_t ldx, int64_t count, float* sums, int64_t ld,
              const uint8_t* ahead, int64_t row_bytes) {
    constexpr int64_t LINES = depth<L>() / 128;  // cache lines of the codes of a row
    constexpr int64_t ldw = stride<L>();
    int64_t line = 0;
    typename L::Acc acc[NT][MT];
    for (int n = 0; n < NT; ++n)
        for (int m = 0; m < MT; ++m) acc[n][m] = L::zero();
    for (int64_t k = 0; k < count; k += L::LANES) {
        if (ahead && line < NT * LINES) {
            __builtin_prefetch(ahead + line / LINES * row_bytes + line % LINES * 64, 0, 2), ++line;
            __builtin_prefetch(ahead + line / LINES * row_bytes + line % LINES * 64, 0, 2), ++line;
        }
        typename L::Vec ws[NT];
#pragma GCC unroll 8
        for (int n = 0; n < NT; ++n) ws[n] = L::load_vec(w + n * ldw + k);
#pragma GCC unroll 8
        for (int m = 0; m < MT; ++m) {
            typename L::Vec v = L::load_vec(x + m * ldx + k);
#pragma GCC unroll 8
            for (int n = 0; n < NT; ++n) acc[n][m] = L::dot(acc[n][m], ws[n], v);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < NT; ++n) {
        if constexpr (MT == 4) L::add_sums(acc[n][0], acc[n][1], acc[n][2], acc[n][3], sums + n * ld);
        else
            for (int m = 0; m < MT; ++m) sums[n * ld + m] += L::sum(acc[n][m]);
    }
}

// `rows` decoded rows, NT at a time, times MT packed rows, which stay in the L1 cache.
template <class L, int MT>
void dot_strips(const typename L::Elem* w, int64_t rows, const typename L::Elem* x, int64_t ldx, int64_t count,
                float* sums, int64_t ld, const uint8_t* ahead, int64_t row_bytes) {
    constexpr int NT = L::MAX_N;
    int64_t n = 0;
    for (; n + NT <= rows; n += NT)
        dot_tile<L, NT, MT>(w + n * stride<L>(), x, ldx, count, sums + n * ld, ld,
                            ahead ? ahead + n * row_bytes : nullptr, row_bytes);
    for (; n < rows; ++n)
        dot_tile<L, 1, MT>(w + n * stride<L>(), x, ldx, count, sums + n * ld, ld, nullptr, row_bytes);
}

// A decoded strip times packed rows of x, `tokens` of them; adds to sums [rows][ld].
template <class L>
void dot_tokens(const typename L::Elem* w, int64_t rows, const typename L::Elem* x, int64_t ldx, int64_t tokens,
                int64_t count, float* sums, int64_t ld, const uint8_t* ahead, int64_t row_bytes) {
    for (int64_t m = 0; m < tokens; ahead = nullptr) {
        // Tiles of nearly equal height: 5 tokens are 3 and 2, not 4 and 1.
        int64_t left = tokens - m, height = left > 8 ? 4 : left > 4 ? (left + 1) / 2 : left;
        const auto* part = x + m * ldx;
        switch (height) {
            case 1: dot_strips<L, 1>(w, rows, part, ldx, count, sums + m, ld, ahead, row_bytes); break;
            case 2: dot_strips<L, 2>(w, rows, part, ldx, count, sums + m, ld, ahead, row_bytes); break;
            case 3: dot_strips<L, 3>(w, rows, part, ldx, count, sums + m, ld, ahead, row_bytes); break;
            default: dot_strips<L, 4>(w, rows, part, ldx, count, sums + m, ld, ahead, row_bytes); break;
        }
        m += height;
    }
}

// Packed activations of `tokens` tokens from `first` on: groups for outer products, then rows.
template <class L> struct Tokens {
    int64_t first, tokens, groups;
    const typename L::Elem* packed;  // [groups][group]
    int64_t group;
    const typename L::Elem* rows;  // [tokens - 16 groups][ldx]
    int64_t ldx;
};

// Rows n0 to n1 of W, no more than STRIP, decoded a depth at a time into the L2 cache, times all of x. next: the row with
// which this thread is likely to go on then.
template <class L, bool SMALL>
bool strip_rows(const Task& t, const Tokens<L>& x, int64_t n0, int64_t n1, int64_t next) {
    using Elem = typename L::Elem;
    constexpr int64_t PIECE = SMALL ? 32 : 64, DEPTH = depth<L>();
    static_assert(DEPTH % L::CHUNK == 0, "depth");
    int64_t row_bytes = t.w.k / 2, rows = n1 - n0, ld = (x.tokens + 15) / 16 * 16, grouped = min_of(16 * x.groups, x.tokens);
    int64_t pieces = t.w.k / PIECE, ld_scales = x.ldx / PIECE;
    int64_t w_bytes = STRIP * stride<L>() * int64_t(sizeof(Elem)), sum_bytes = STRIP * ld * int64_t(sizeof(float));
    char* memory = static_cast<char*>(scratch.get(w_bytes + sum_bytes + rows * ld_scales * int64_t(sizeof(float))));
    if (!memory) return false;
    auto* w = reinterpret_cast<Elem*>(memory);
    float* sums = reinterpret_cast<float*>(memory + w_bytes);
    float* scales = reinterpret_cast<float*>(memory + w_bytes + sum_bytes);
    if (pieces == ld_scales) piece_scales(t.w, n0 * t.w.k, rows * pieces, rows * pieces, PIECE, scales);
    else
        for (int64_t r = 0; r < rows; ++r)
            piece_scales(t.w, (n0 + r) * t.w.k, pieces, ld_scales, PIECE, scales + r * ld_scales);
    if (rows < STRIP) std::memset(w + rows * stride<L>(), 0, size_t((STRIP - rows) * stride<L>()) * sizeof(Elem));
    std::memset(sums, 0, size_t(sum_bytes));
    for (int64_t k = 0; k < t.w.k; k += DEPTH) {
        int64_t count = min_of(DEPTH, t.w.k - k), padded = (count + L::CHUNK - 1) / L::CHUNK * L::CHUNK;
        for (int64_t r = 0; r < rows; ++r)
            decode_row<L, SMALL>(t.w.codes + (n0 + r) * row_bytes + k / 2, count / 2, t.w.codebook,
                                 scales + r * ld_scales + k / PIECE, w + r * stride<L>());
        bool last = k + DEPTH >= t.w.k;
        const uint8_t* ahead = nullptr;  // codes that are decoded next, where they are a whole depth
        if (k + 2 * DEPTH <= t.w.k) ahead = t.w.codes + n0 * row_bytes + (k + DEPTH) / 2;
        else if (last && next + STRIP <= t.w.n && DEPTH <= t.w.k) ahead = t.w.codes + next * row_bytes;
#if defined(KBIT_AVX512)
        if (x.groups) {
            const Elem* from = x.packed + k * GROUP;
            OuterAhead<L> after{ahead, row_bytes, last ? x.packed : from + DEPTH * GROUP, 0};
            outer_strips<L>(w, rows, from, x.groups, x.group, padded / word<L>(), sums, ld, after);
            ahead = nullptr;
        }
#endif
        dot_tokens<L>(w, rows, x.rows + k, x.ldx, x.tokens - grouped, padded, sums + grouped, ld, ahead, row_bytes);
    }
#if defined(KBIT_AVX512)
    int64_t ld_out = t.n1 - t.n0, column = n0 - t.n0;
    store_outer(sums, ld, rows, x.tokens, t.bias, column, t.out, x.first * ld_out + column, ld_out, t.dtype);
#else
    for (int64_t m = 0; m < x.tokens; ++m)
        for (int64_t n = 0; n < rows; ++n) finish(t, x.first + m, n0 + n, sums[n * ld + m]);
#endif
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

// Few tokens times several W: x is packed once, and the threads share out the rows of all W, counted through.
template <class L, bool SMALL> bool fused_product(const Task* tasks, int64_t count) {
    const Task& first = tasks[0];
    int64_t ldx = (first.w.k + L::CHUNK - 1) / L::CHUNK * L::CHUNK, rows = 0;
    for (int64_t i = 0; i < count; ++i) rows += tasks[i].n1 - tasks[i].n0;
    auto* x = static_cast<typename L::Elem*>(packed_x.get(first.m * ldx * int64_t(sizeof(typename L::Elem))));
    if (!x) return false;
    parallel_for(first.m, 1 + 16384 / ldx, first.threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) pack_row<L>(first.x, row, first, ldx, x + row * ldx);
    });
    std::atomic<bool> complete{true};
    // Long units: the first rows of each come from memory without having been fetched ahead.
    parallel_for(rows, 8 + rows / (16 * first.threads) / 4 * 4, first.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0, at = 0; i < count && at < end; ++i) {
            const Task& t = tasks[i];
            int64_t from = begin > at ? begin - at : 0, to = min_of(end - at, t.n1 - t.n0);
            if (from < to && !rows_of<L, SMALL>(t, x, ldx, t.n0 + from, t.n0 + to)) complete = false;
            at += t.n1 - t.n0;
        }
    });
    return complete;
}

constexpr int64_t TOKENS = 256;  // at a time: the L3 cache holds their packed form

template <class L, bool SMALL> bool strip_product(const Task& t) {
    int64_t ldx = (t.w.k + L::CHUNK - 1) / L::CHUNK * L::CHUNK, rows = t.n1 - t.n0, group = 0;
    std::atomic<bool> complete{true};
    for (int64_t m = 0; m < t.m; m += TOKENS) {
        int64_t tokens = min_of(TOKENS, t.m - m), groups = 0;
#if defined(KBIT_AVX512)
        groups = (tokens + 3) / GROUP, group = group_size<L>(t.w.k);  // up to 12 tokens alone cost less as rows
#endif
        int64_t left = tokens > 16 * groups ? tokens - 16 * groups : 0;
        auto* x = static_cast<typename L::Elem*>(
            packed_x.get((groups * group + left * ldx) * int64_t(sizeof(typename L::Elem))));
        if (!x) return false;
        auto* x_rows = x + groups * group;
        if (left)
            parallel_for(left, 1 + 16384 / ldx, t.threads, [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; ++row)
                    pack_row<L>(t.x, m + tokens - left + row, t, ldx, x_rows + row * ldx);
            });
#if defined(KBIT_AVX512)
        parallel_for(groups, 1, t.threads, [&](int64_t begin, int64_t end) {
            for (int64_t g = begin; g < end; ++g)
                pack_group<L>(t.x, m + g * GROUP, min_of(GROUP, tokens - g * GROUP), t.x_stride, t.w.k, t.dtype, x + g * group);
        });
#endif
        Tokens<L> packed{m, tokens, groups, x, group, x_rows, ldx};
        parallel_for(rows, STRIP, t.threads, [&](int64_t begin, int64_t end) {
            int64_t next = t.n0 + end + (t.threads - 1) * STRIP;
            if (!strip_rows<L, SMALL>(t, packed, t.n0 + begin, t.n0 + end, next)) complete = false;
        });
    }
    return complete;
}

template <class L, bool SMALL> bool product(const Task* tasks, int64_t count) {
    constexpr int64_t FUSED_TOKENS = sizeof(typename L::Elem) == 2 ? 8 : 4;
    if constexpr (L::FUSED)  // where there are enough registers
        if (tasks->m <= FUSED_TOKENS) return fused_product<L, SMALL>(tasks, count);
    for (int64_t i = 0; i < count; ++i)
        if (!strip_product<L, SMALL>(tasks[i])) return false;
    return true;
}

template <class L> bool product(const Task* tasks, int64_t count) {
    return tasks->w.block_size == 32 ? product<L, true>(tasks, count) : product<L, false>(tasks, count);
}

// `count` weights from flat position `at` on, in their order.
template <int D> void decode_run(const Weight& w, int64_t at, int64_t count, typename OutElem<D>::type* out) {
    int64_t end = at + count, block = at / w.block_size, stop = (block + 1) * w.block_size;
    for (; at < end; at = stop, stop += w.block_size, ++block) {
        stop = min_of(stop, end);
        look_up<D>(w.codes, at, stop - at, w.codebook, scale_at(w, block), out);
        out += stop - at;
    }
}

template <int D> void decode(const Task& t) {
    // One range of rows for each thread: memory that two cores write by turns would move between their caches.
    int64_t width = t.k1 - t.k0, rows = t.n1 - t.n0;
    auto* out = static_cast<typename OutElem<D>::type*>(t.out);
    parallel_for(rows, (rows + t.threads - 1) / t.threads, t.threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            decode_run<D>(t.w, (t.n0 + r) * t.w.k + t.k0, width, out + r * width);
    });
}

template <int D> bool embedding(const Task& t) {
    auto* ids = static_cast<const int64_t*>(t.x);
    auto* out = static_cast<typename OutElem<D>::type*>(t.out);
    for (int64_t m = 0; m < t.m; ++m)
        if (ids[m] < 0 || ids[m] >= t.w.n) return false;
    parallel_for(t.m, 1 + 16384 / (t.w.k + 1), t.threads, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) decode_run<D>(t.w, ids[m] * t.w.k, t.w.k, out + m * t.w.k);
    });
    return true;
}

}  // namespace

// Row layout only: K a multiple of the block size, which is a power of two from 32. The tasks of one call share x, its
// dtype, K and the block size. 1: out of memory.
KBIT_EXPORT(int32_t, kbit_linear_4bit)(const Task* tasks, int64_t count) {
    int32_t dtype = tasks->dtype;
#if defined(KBIT_AVX512BF16)
    if (dtype == BF16) return !product<Bf16Lane>(tasks, count);
#endif
    if (dtype == F32) return !product<FloatLane<F32>>(tasks, count);
    return dtype == BF16 ? !product<FloatLane<BF16>>(tasks, count) : !product<FloatLane<F16>>(tasks, count);
}

// Any layout and block size.
KBIT_EXPORT(int32_t, kbit_decode_4bit)(const Task* t) {
    if (t->dtype == F32) decode<F32>(*t);
    else if (t->dtype == BF16) decode<BF16>(*t);
    else decode<F16>(*t);
    return 0;
}

// Any layout and block size. 1: an index is out of range.
KBIT_EXPORT(int32_t, kbit_embedding_4bit)(const Task* t) {
    if (t->dtype == F32) return !embedding<F32>(*t);
    return t->dtype == BF16 ? !embedding<BF16>(*t) : !embedding<F16>(*t);
}
