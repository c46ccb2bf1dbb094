// Products of decoded rows of W with many tokens on AVX512, as outer products.
//
// Tokens lie in the lanes of a vector. x is packed once a call, 16 tokens at a time, as [words][16][4 bytes]: a word is one fp32
// or two bf16 of a token, words come in the order in which a Lane decodes. A word of a decoded row is broadcast and meets
// all tokens of the tile, so that neither operand is laid out anew and no sum runs across lanes.

#pragma once

#include "decode_4bit.h"
#include "transpose.h"

namespace {

// A strip of W is decoded a piece of its rows at a time. It stays in the L2 cache.
constexpr int64_t STRIP = 48;           // rows: a multiple of every tile's height
constexpr int64_t DEPTH_BYTES = 2048;   // of a decoded row: four rows of x stay in the L1 cache beside it
template <class L> constexpr int64_t depth() { return DEPTH_BYTES / int64_t(sizeof(typename L::Elem)); }
// From row to row, in elements: rows a power of two apart would share sets of the cache.
template <class L> constexpr int64_t stride() { return depth<L>() + 64 / int64_t(sizeof(typename L::Elem)); }

}  // namespace

#if defined(KBIT_AVX512)
namespace {

constexpr int64_t GROUP = 16;  // tokens that are packed together
template <class L> constexpr int64_t word() { return 4 / int64_t(sizeof(typename L::Elem)); }  // elements

// Elements of a packed group: whole chunks of K, and a cache line so that groups do not share sets.
template <class L> int64_t group_size(int64_t k) {
    return ((k + L::CHUNK - 1) / L::CHUNK * L::CHUNK / word<L>() + 1) * GROUP * word<L>();
}

// A chunk of 16 tokens, `stride` elements apart, to its place in a packed group.
template <class L> void pack_chunk(const typename L::Elem* x, int64_t stride, typename L::Elem* out) {
    constexpr int64_t W = word<L>(), WIDE = 16 * W;     // elements of a vector
    constexpr int64_t APART = L::VECTORS / W;            // words that one lane of the Lane's vectors take from here
    for (int64_t v = 0; v < L::CHUNK / WIDE; ++v) {
        __m512i r[16], t[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            r[i] = _mm512_loadu_si512(x + i * stride + v * WIDE);
            // A decoded word holds weights j and j + 4 of eight.
            if constexpr (W == 2) r[i] = _mm512_unpacklo_epi16(r[i], _mm512_unpackhi_epi64(r[i], r[i]));
        }
        transpose16(r, t);
        constexpr int64_t PER = W == 2 ? 4 : 8;
        static_assert(W == 2 ? APART == 2 && L::VECTORS == 4 : L::VECTORS == 8, "the order of a Lane");
#pragma GCC unroll 16
        for (int64_t d = 0; d < 16; ++d)
            _mm512_storeu_si512(out + (d % PER * 16 + v * (16 / PER) + d / PER) * WIDE, t[d]);
    }
}

// Tokens [first, first + count) of x as a group, zeros for those up to 16 and behind K.
template <class L>
void pack_group(const void* x, int64_t first, int64_t count, int64_t x_stride, int64_t k, int dtype,
                typename L::Elem* out) {
    using Elem = typename L::Elem;
    alignas(64) Elem stage[GROUP * L::CHUNK];
    const bool direct = count == GROUP && element_size(dtype) == int64_t(sizeof(Elem));
    if (!direct) std::memset(stage, 0, sizeof stage);
    for (int64_t c = 0; c < k; c += L::CHUNK, out += L::CHUNK * GROUP) {
        if (direct && c + L::CHUNK <= k) {
            pack_chunk<L>(static_cast<const Elem*>(x) + first * x_stride + c, x_stride, out);
            continue;
        }
        int64_t some = k - c < L::CHUNK ? k - c : L::CHUNK;
        for (int64_t i = 0; i < count; ++i) {
            int64_t begin = (first + i) * x_stride + c;
            if constexpr (sizeof(Elem) == 2)
                std::memcpy(stage + i * L::CHUNK, static_cast<const Elem*>(x) + begin, size_t(some) * sizeof(Elem));
            else load_floats(stage + i * L::CHUNK, x, begin, some, dtype);
            std::memset(stage + i * L::CHUNK + some, 0, size_t(L::CHUNK - some) * sizeof(Elem));
        }
        pack_chunk<L>(stage, L::CHUNK, out);
    }
}

// What is fetched into the L2 cache while a tile multiplies, so that memory works meanwhile.
template <class L> struct OuterAhead {
    const uint8_t* codes;            // of the rows of W that are decoded next, row_bytes apart; or null
    int64_t row_bytes;
    const typename L::Elem* tokens;  // the groups that are multiplied next
    int64_t share;                   // which lines of them this tile fetches: every fourth (of one group every second)
};

// R decoded rows times H groups of packed tokens, `group` elements apart, over `words` words. Adds to sums [R][ld].
template <class L, int R, int H>
void outer_tile(const typename L::Elem* w, const typename L::Elem* x, int64_t group, int64_t words,
                float* sums, int64_t ld, const OuterAhead<L>& ahead) {
    constexpr int64_t LINES = depth<L>() / 128, W = word<L>(), TURNS = H == 1 ? 2 : 4;
    typename L::Acc acc[R][H];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) acc[r][h] = L::zero();
    for (int64_t i = 0; i < words; ++i) {
        if (ahead.codes && i % 2 == 0 && i / 2 < R * LINES)
            __builtin_prefetch(ahead.codes + i / 2 / LINES * ahead.row_bytes + i / 2 % LINES * 64, 0, 2);
        if (i % TURNS == ahead.share)
            for (int h = 0; h < H; ++h) __builtin_prefetch(ahead.tokens + h * group + i * GROUP * W, 0, 2);
        typename L::Vec v[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) v[h] = L::load_vec(x + h * group + i * GROUP * W);
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
            int32_t bits;
            std::memcpy(&bits, w + r * stride<L>() + i * W, 4);
            __m512i all = _mm512_set1_epi32(bits);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                if constexpr (W == 2) acc[r][h] = L::dot(acc[r][h], all, v[h]);
                else acc[r][h] = L::dot(acc[r][h], _mm512_castsi512_ps(all), v[h]);
            }
        }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            float* to = sums + r * ld + h * GROUP;  // short sums of their own, which are more accurate than one long one
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), acc[r][h]));
        }
}

// All rows of a strip times H groups. Rows up to the next multiple of a tile's height are computed and not used.
template <class L, int H>
void outer_strip(const typename L::Elem* w, int64_t rows, const typename L::Elem* x, int64_t group, int64_t words,
                 float* sums, int64_t ld, OuterAhead<L> ahead) {
    constexpr int R = 24 / H;  // with H vectors of tokens and one of weights nearly all registers
    static_assert(STRIP % R == 0, "tiles fill a strip");
    const uint8_t* codes = ahead.codes;
    for (int64_t r = 0; r < rows; r += R) {
        ahead.codes = codes && r + R <= rows ? codes + r * ahead.row_bytes : nullptr;
        ahead.share = r / R;
        outer_tile<L, R, H>(w + r * stride<L>(), x, group, words, sums + r * ld, ld, ahead);
    }
}

// A decoded strip times all groups. ahead: what comes after it.
template <class L>
void outer_strips(const typename L::Elem* w, int64_t rows, const typename L::Elem* x, int64_t groups, int64_t group,
                  int64_t words, float* sums, int64_t ld, OuterAhead<L> ahead) {
    const typename L::Elem* after = ahead.tokens;
    for (int64_t g = 0; g < groups;) {
        int64_t left = groups - g, taken = left == 3 || left == 1 ? left : 2;  // 2 + 1 would be slower than 3
        const auto* tokens = x + g * group;
        ahead.tokens = g + 2 * taken <= groups ? tokens + taken * group : after;
        if (taken == 1) outer_strip<L, 1>(w, rows, tokens, group, words, sums + g * GROUP, ld, ahead);
        else if (taken == 2) outer_strip<L, 2>(w, rows, tokens, group, words, sums + g * GROUP, ld, ahead);
        else outer_strip<L, 3>(w, rows, tokens, group, words, sums + g * GROUP, ld, ahead);
        ahead.codes = nullptr;
        g += taken;
    }
}

// sums [rows][ld] (+ bias [rows]) to out [tokens], rows `ld_out` elements apart, of `dtype`.
inline void store_outer(const float* sums, int64_t ld, int64_t rows, int64_t tokens, const void* bias, int64_t bias_at,
                        void* out, int64_t out_at, int64_t ld_out, int dtype) {
    for (int64_t n = 0; n < rows; n += 16) {
        int64_t some = rows - n < 16 ? rows - n : 16;
        __mmask16 live = __mmask16((1u << some) - 1);
        alignas(64) float add[16] = {};
        if (bias) load_floats(add, bias, bias_at + n, some, dtype);
        const __m512 more = _mm512_load_ps(add);
        for (int64_t m = 0; m < tokens; m += GROUP) {
            __m512i r[16], t[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) r[i] = i < some ? _mm512_loadu_si512(sums + (n + i) * ld + m) : _mm512_setzero_si512();
            transpose16(r, t);
            alignas(64) float values[16][16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_store_ps(values[i], _mm512_add_ps(_mm512_castsi512_ps(t[i]), more));
            for (int64_t i = 0; i < 16 && m + i < tokens; ++i) {
                int64_t at = out_at + (m + i) * ld_out + n;
                __m512 v = _mm512_load_ps(values[i]);
                if (dtype == F32) _mm512_mask_storeu_ps(static_cast<float*>(out) + at, live, v);
                else if (dtype == F16)
                    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, live, _mm512_cvtps_ph(v, 0));
                else store_floats(values[i], out, at, some, dtype);
            }
        }
    }
}

}  // namespace
#endif
