// Products with a 4-bit weight W [N, K] on the CPU, and the decoding of any rectangle of W.
//
// kbit_linear_4bit     x [M, K] -> out [M, rows of W], for one W or several: W is decoded in registers (few tokens), or a
//                      strip of rows at a time into the L2 cache (more tokens). Sums are fp32; W is rounded to x's dtype
//                      first, as in the plain torch path. A row's sum is always taken in the same order: results do not
//                      depend on threads, nor on the other W.
// kbit_decode_4bit     W[n0:n1, k0:k1] -> a dense buffer, for products that a matrix library does, and for dequantizing.
// kbit_embedding_4bit  rows of W by index -> a dense buffer.

#include "fused_4bit.h"
#include "outer_4bit.h"

namespace {

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
