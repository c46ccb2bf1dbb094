// Integer products of rows of int8 activations with a panel of rows of an int8 weight: exact sums.
//
// AVX512-VNNI multiplies unsigned with signed bytes: the weight is taken as code + 128, and 128 times the sum of a row of
// activations is taken off in the end. int32 sums may wrap on the way; the difference is right modulo 2^32.
//
// Few rows read the panel where it lies. For more, CHUNK columns of it at a time are laid out as [CHUNK / 4][PANEL][4] in
// a buffer that the L1 cache holds, while the next are on their way to the L2 cache. They meet tiles of activations
// that are laid out likewise, [K / 4][rows][4]: one address for all rows, and one page at a time.

#pragma once

#include "transpose.h"

namespace {

constexpr int64_t PANEL = 32;  // rows of W in a unit of work
constexpr int TILE = 14;       // rows of activations that are multiplied at once

// Products give sums [rows][PANEL].

#if defined(KBIT_AVX512)
constexpr int FEW = 8;              // rows of activations that read W where it lies
constexpr int64_t PREFETCH = 2048;  // bytes ahead in a row of W, for them
constexpr int64_t CHUNK = 512;

inline __m512i unsigned_weights(__m512i w) { return _mm512_xor_si512(w, _mm512_set1_epi8(char(0x80))); }

// Columns [begin, end) of R rows of activations with those of W rows of the weight, added to `sums`.
template <int W, int R>
void dots(const int8_t* a, int64_t stride, const int8_t* w, int64_t k, int64_t begin, int64_t end, int32_t* sums) {
    __m512i acc[W][R];
#pragma GCC unroll 16
    for (int j = 0; j < W; j++)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) acc[j][r] = _mm512_setzero_si512();
    for (int64_t i = begin; i < end; i += 64) {
        __mmask64 in = end - i >= 64 ? ~0ull : (1ull << (end - i)) - 1;
        __m512i weights[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; j++) {
            _mm_prefetch(reinterpret_cast<const char*>(w + j * k + i + PREFETCH), _MM_HINT_T0);
            weights[j] = unsigned_weights(_mm512_maskz_loadu_epi8(in, w + j * k + i));
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            __m512i row = _mm512_loadu_si512(a + r * stride + i);  // zero beyond K
#pragma GCC unroll 16
            for (int j = 0; j < W; j++) acc[j][r] = _mm512_dpbusd_epi32(acc[j][r], weights[j], row);
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < W; j++)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            sums[r * PANEL + j] = int32_t(uint32_t(sums[r * PANEL + j]) + uint32_t(_mm512_reduce_add_epi32(acc[j][r])));
}

// A stretch of columns at a time, so short that the activations stay in the L1 cache for all rows of the panel.
template <int R> void few_rows(const int8_t* a, int64_t stride, const int8_t* w, int64_t n, int64_t k, int32_t* sums) {
    constexpr int W = R <= 6 ? 4 : 2;
    constexpr int64_t STEP = 24576 / R / 64 * 64;
    std::memset(sums, 0, size_t(R * PANEL) * sizeof(int32_t));
    for (int64_t begin = 0; begin < k; begin += STEP) {
        int64_t end = begin + STEP < k ? begin + STEP : k, j = 0;
        for (; j + W <= n; j += W) dots<W, R>(a, stride, w + j * k, k, begin, end, sums + j);
        for (; j < n; j++) dots<1, R>(a, stride, w + j * k, k, begin, end, sums + j);
    }
}

// 16 rows of W, 64 bytes each from column `begin`, as [16][16 rows][4]; zero codes beyond n rows and k columns.
void pack16(const int8_t* w, int64_t n, int64_t k, int64_t begin, uint8_t* out) {
    __m512i r[16], t[16];
    __mmask64 in = k - begin >= 64 ? ~0ull : (1ull << (k - begin)) - 1;
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
        if (j < n) _mm_prefetch(reinterpret_cast<const char*>(w + j * k + begin + 256), _MM_HINT_T0);
        r[j] = j < n ? _mm512_maskz_loadu_epi8(in, w + j * k + begin) : _mm512_setzero_si512();
        r[j] = unsigned_weights(r[j]);
    }
    transpose16(r, t);
#pragma GCC unroll 16
    for (int c = 0; c < 16; c++) _mm512_store_si512(out + c * PANEL * 4, t[c]);
}

// Columns [begin, end) of a panel, `packed` beginning with the first.
void pack(const int8_t* w, int64_t n, int64_t k, int64_t begin, int64_t end, uint8_t* packed) {
    for (int64_t some = begin; some < end; some += 256)  // a few lines of a row in turn, as memory likes it
        for (int64_t j = 0; j < PANEL; j += 16)
            for (int64_t i = some; i < (some + 256 < end ? some + 256 : end); i += 64)
                pack16(w + j * k, n - j, k, i, packed + (i - begin) * PANEL + j * 4);
}

// What `outer` brings into the L2 cache meanwhile, so that memory works while the cores multiply: `lines` a step of the raw
// weight that is packed next, and activations, whose tiles are too short for the hardware to find their pace.
struct Ahead {
    const char* w;      // its first row, where its columns begin
    int64_t k;          // bytes from row to row
    int64_t row, lines;  // the first row of this tile's share
    const char* tokens;  // the activations that are multiplied next, as many as now
};

// Adds to sums [R][PANEL] the products of a tile of R rows with `columns` of a packed panel.
template <int R>
void outer(const int8_t* a, const uint8_t* packed, int64_t columns, bool first, int32_t* sums, const Ahead& ahead) {
    __m512i acc[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
            acc[r][h] = first ? _mm512_setzero_si512() : _mm512_load_si512(sums + r * PANEL + h * 16);
    for (int64_t i = 0; i < columns; i += 4) {
        _mm_prefetch(reinterpret_cast<const char*>(packed + i * PANEL + 1024), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(packed + i * PANEL + 1088), _MM_HINT_T0);
        if (i * 16 < columns * R) _mm_prefetch(ahead.tokens + i * 16, _MM_HINT_T1);
        for (int64_t l = 0; l < ahead.lines; l++)
            _mm_prefetch(ahead.w + (ahead.row + (i / 4 % 16) * ahead.lines + l) * ahead.k + i / 64 * 64, _MM_HINT_T1);
        __m512i w0 = _mm512_load_si512(packed + i * PANEL), w1 = _mm512_load_si512(packed + i * PANEL + 64);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, a + i * R + r * 4, 4);
            __m512i row = _mm512_set1_epi32(four);
            acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, row);
            acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, row);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) _mm512_store_si512(sums + r * PANEL + h * 16, acc[r][h]);
}

void tile_few(int64_t count, const int8_t* a, int64_t stride, const int8_t* w, int64_t n, int64_t k, int32_t* sums) {
    static constexpr decltype(&few_rows<1>) BY_COUNT[] = {few_rows<1>, few_rows<2>, few_rows<3>, few_rows<4>,
                                                          few_rows<5>, few_rows<6>, few_rows<7>, few_rows<8>};
    static_assert(sizeof(BY_COUNT) == FEW * sizeof(void*), "one for each number of rows");
    BY_COUNT[count - 1](a, stride, w, n, k, sums);
}

void tile_packed(int64_t count, const int8_t* a, const uint8_t* packed, int64_t columns, bool first, int32_t* sums,
                 const Ahead& ahead) {
    static constexpr decltype(&outer<1>) BY_COUNT[] = {outer<1>,  outer<2>,  outer<3>,  outer<4>,  outer<5>,
                                                       outer<6>,  outer<7>,  outer<8>,  outer<9>,  outer<10>,
                                                       outer<11>, outer<12>, outer<13>, outer<14>};
    static_assert(sizeof(BY_COUNT) == TILE * sizeof(void*), "one for each number of rows");
    BY_COUNT[count - 1](a, packed, columns, first, sums, ahead);
}

// Up to TILE rows of `stride` bytes, a multiple of 64, as a tile.
void interleave(const int8_t* rows, int64_t count, int64_t stride, int8_t* tile) {
    const __mmask16 some = __mmask16((1u << count) - 1);
    for (int64_t i = 0; i < stride; i += 64) {
        __m512i r[16], t[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++)
            r[j] = j < count ? _mm512_loadu_si512(rows + j * stride + i) : _mm512_setzero_si512();
        transpose16(r, t);
#pragma GCC unroll 16
        for (int c = 0; c < 16; c++) _mm512_mask_storeu_epi32(tile + (i + c * 4) * count, some, t[c]);
    }
}

// sums [rows][PANEL] of n rows of W with rows of activations a in tiles of `tile`, each row `stride` bytes. packed: room
// for a chunk; next: the panel that this thread is likely to take then.
void many_rows(int64_t rows, int64_t tile, const int8_t* a, int64_t stride, const int8_t* w, int64_t n, int64_t k,
               const int8_t* next, uint8_t* packed, int32_t* sums) {
    int64_t fetchers = rows > tile ? 2 : 1;  // the last tiles bring the next chunk, PANEL lines in 16 steps
    for (int64_t begin = 0; begin < k; begin += CHUNK) {
        int64_t columns = begin + CHUNK < k ? CHUNK : k - begin;
        pack(w, n, k, begin, begin + columns, packed);
        Ahead ahead{reinterpret_cast<const char*>(begin + CHUNK < k ? w + begin + CHUNK : next), k, 0, 0, nullptr};
        for (int64_t row = 0; row < rows; row += tile) {
            int64_t count = rows - row < tile ? rows - row : tile;
            int64_t left = (rows - row + tile - 1) / tile;  // tiles from this one on
            if (left <= fetchers) ahead.lines = PANEL / 16 / fetchers, ahead.row = (fetchers - left) * 16 * ahead.lines;
            const int8_t* part = a + row * stride + begin * count;
            int64_t then = row + tile < rows ? row + tile : 0, size = rows - then < tile ? rows - then : tile;
            int64_t at = then ? begin : begin + CHUNK < k ? begin + CHUNK : 0;
            ahead.tokens = reinterpret_cast<const char*>(a + then * stride + at * size);
            tile_packed(count, part, packed, columns, begin == 0, sums + row * PANEL, ahead);
        }
    }
}
#else
// The compiler makes dot-product or multiply-add instructions of it.
inline int32_t dot(const int8_t* a, const int8_t* w, int64_t k) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; i++) sum += int32_t(a[i]) * int32_t(w[i]);
    return sum;
}

void tile_few(int64_t count, const int8_t* a, int64_t stride, const int8_t* w, int64_t n, int64_t k, int32_t* sums) {
    for (int64_t j = 0; j < n; j++)  // a row of W stays in the L1 cache for all rows of activations
        for (int64_t r = 0; r < count; r++) sums[r * PANEL + j] = dot(a + r * stride, w + j * k, k);
}
#endif

}  // namespace
