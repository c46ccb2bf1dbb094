// Products with an int8 weight W [N, K] that has one scale a row: out [M, N] = x [M, K] @ W^T.
//
// LLM_INT8     x is quantized to int8 by rows, but for the columns that hold an outlier; those are multiplied in fp32.
// WEIGHT_ONLY  x counts as it is. AVX512 multiplies it in integers too: a token is scaled to an integer of 22 bits (16 from
//              5 tokens on; 30 for fp32), which is cut into 3 (2, 4) signed bytes, the planes. Each plane is a row of int8
//              activations; sums are exact. What is lost is 2^-23 (2^-16, 2^-31) of the token's largest value.
//
// AVX512-VNNI multiplies unsigned with signed bytes: the weight is taken as code + 128, and 128 times the sum of a row of
// activations is taken off in the end. int32 sums may wrap on the way; the difference is right modulo 2^32.
//
// Threads take panels of PANEL rows of W. A panel meets few rows of activations straight from memory; for many it is laid
// out once as [K / 4][PANEL][4] in a buffer of the thread that fits the L2 cache.

#include "common.h"

namespace {

constexpr int64_t PANEL = 32;  // rows of W in a unit of work
constexpr int64_t PREFETCH = 2048;  // bytes ahead in a row of W
constexpr int TILE = 12;       // rows of activations that are multiplied at once
enum Mode { WEIGHT_ONLY, LLM_INT8 };

struct Task {
    const void* x;        // [M, K] contiguous
    const int8_t* w;      // [N, K] contiguous
    const float* absmax;  // [N]
    const void* bias;     // [N], or null
    void* out;            // [M, N] contiguous
    int64_t m, n, k;
    float threshold;      // magnitude from which a column is an outlier; 0: none
    int32_t dtype;        // of x, bias and out
    int32_t mode, threads;
};

// Activations as rows of int8.
struct Rows {
    int planes;            // rows a token
    int64_t count, stride;  // rows, bytes from one to the next: zeros after K
    int8_t* codes;         // [count, stride]
    int32_t* sums;         // [count] 128 times the sum of a row, where the product takes W as unsigned
    float* scale;          // [tokens] of the sums; a second factor where one would overflow
    float* scale2;
    int64_t outliers;      // columns multiplied in fp32
    const int64_t* columns;  // [outliers]
    const float* values;   // [tokens, outliers] their activations
};

int64_t padded(int64_t k) {
    int64_t lines = (k + 63) / 64;
    return (lines + !(lines & 1)) * 64;  // an odd number of cache lines: rows a power of two apart would share sets
}

// ---- activations ----

float largest(const float* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t a = bits_of(x[i]) & 0x7fffffff;
        most = a > most ? a : most;
    }
    return float_of(most);  // NaN is largest of all
}

// int8_codes of kbit/formats/blocks.py, for values no larger than absmax.
void row_codes(const float* x, float absmax, int8_t* codes, int64_t k) {
    float boost = absmax < 7.888609052210118e-31f ? 18446744073709551616.0f : 1.0f;
    float inverse = absmax > 0.0f ? 1.0f / (absmax * boost) * 127.0f : 0.0f;  // as torch divides a number by a tensor
    for (int64_t i = 0; i < k; i++) {
        float v = x[i] * boost * inverse;
        codes[i] = int8_t(int32_t((v + 12582912.0f) - 12582912.0f));  // to the nearest even
    }
}

#if defined(KBIT_AVX512)
// One token as planes. Returns false where it is not finite.
bool row_planes(const float* x, Rows& rows, int64_t token, int64_t k) {
    float most = largest(x, k);
    if ((bits_of(most) & 0x7f800000) == 0x7f800000) return false;
    int exponent = most == 0.0f ? 0 : std::ilogb(most);
    // The largest magnitude becomes less than 2^30 or 2^22 by a power of two, or what two planes can hold just so.
    float top = rows.planes == 2 ? 32639.0f / std::ldexp(most == 0.0f ? 1.0f : most, -exponent) : 1.0f;
    int shift = (rows.planes == 4 ? 29 : rows.planes == 3 ? 21 : 0) - exponent, half = shift / 2;
    __m512 first = _mm512_set1_ps(std::ldexp(1.0f, half)), second = _mm512_set1_ps(std::ldexp(top, shift - half));
    int8_t* codes = rows.codes + token * rows.planes * rows.stride;
    const __m512i round = _mm512_set1_epi32(128);
    for (int64_t i = 0; i < k; i += 16) {
        __mmask16 in = k - i >= 16 ? 0xffff : __mmask16((1u << (k - i)) - 1);
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(in, x + i), first), second));
        for (int p = 0; p < rows.planes; p++) {
            _mm512_mask_cvtepi32_storeu_epi8(codes + p * rows.stride + i, in, q);
            q = _mm512_srai_epi32(_mm512_add_epi32(q, round), 8);
        }
    }
    rows.scale[token] = std::ldexp(1.0f, -half);
    rows.scale2[token] = std::ldexp(1.0f / top, half - shift);
    return true;
}
#endif

void finish_row(Rows& rows, int64_t row, int64_t k) {
    int8_t* codes = rows.codes + row * rows.stride;
    std::memset(codes + k, 0, size_t(rows.stride - k));
    int32_t sum = 0;
#if defined(KBIT_AVX512)
    for (int64_t i = 0; i < k; i++) sum += codes[i];
#endif
    rows.sums[row] = int32_t(uint32_t(sum) * 128u);
}

// ---- integer products: sums [TILE][PANEL] of `count` rows of activations with a panel ----

#if defined(KBIT_AVX512)
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
    constexpr int64_t STRETCH = 24576 / R / 64 * 64;
    std::memset(sums, 0, size_t(R * PANEL) * sizeof(int32_t));
    for (int64_t begin = 0; begin < k; begin += STRETCH) {
        int64_t end = begin + STRETCH < k ? begin + STRETCH : k, j = 0;
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
        if (j < n) _mm_prefetch(reinterpret_cast<const char*>(w + j * k + begin + PREFETCH), _MM_HINT_T0);
        r[j] = j < n ? _mm512_maskz_loadu_epi8(in, w + j * k + begin) : _mm512_setzero_si512();
        r[j] = unsigned_weights(r[j]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 16; j += 2) {
        t[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
        t[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 16; j += 4) {
        r[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
        r[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
        r[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
        r[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
    }
    // r[4g + c] holds, in its lane l, column 4l + c of rows 4g to 4g + 3.
#pragma GCC unroll 16
    for (int c = 0; c < 4; c++) {
        __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44), high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee);
        __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
        __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
        t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
#pragma GCC unroll 16
    for (int c = 0; c < 16; c++) _mm512_store_si512(out + c * PANEL * 4, t[c]);
}

void pack(const int8_t* w, int64_t n, int64_t k, uint8_t* out) {
    for (int64_t begin = 0; begin < k; begin += 256)  // a few lines of a row in turn, as memory likes it
        for (int64_t j = 0; j < PANEL; j += 16)
            for (int64_t i = begin; i < (begin + 256 < k ? begin + 256 : k); i += 64)
                pack16(w + j * k, n - j, k, i, out + i * PANEL + j * 4);
}

// R rows of activations with a packed panel.
template <int R> void outer(const int8_t* a, int64_t stride, const uint8_t* packed, int64_t k, int32_t* sums) {
    __m512i acc[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 4) {
        __m512i w0 = _mm512_load_si512(packed + i * PANEL), w1 = _mm512_load_si512(packed + i * PANEL + 64);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, a + r * stride + i, 4);
            __m512i row = _mm512_set1_epi32(four);
            acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, row);
            acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, row);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        _mm512_storeu_si512(sums + r * PANEL, acc[r][0]);
        _mm512_storeu_si512(sums + r * PANEL + 16, acc[r][1]);
    }
}

#define KBIT_FOR_ROWS(call) \
    switch (count) { \
    case 1: return call<1>(KBIT_ARGUMENTS); case 2: return call<2>(KBIT_ARGUMENTS); \
    case 3: return call<3>(KBIT_ARGUMENTS); case 4: return call<4>(KBIT_ARGUMENTS); \
    case 5: return call<5>(KBIT_ARGUMENTS); case 6: return call<6>(KBIT_ARGUMENTS); \
    case 7: return call<7>(KBIT_ARGUMENTS); case 8: return call<8>(KBIT_ARGUMENTS); \
    case 9: return call<9>(KBIT_ARGUMENTS); case 10: return call<10>(KBIT_ARGUMENTS); \
    case 11: return call<11>(KBIT_ARGUMENTS); default: return call<12>(KBIT_ARGUMENTS); \
    }
static_assert(TILE == 12, "KBIT_FOR_ROWS");

void tile_few(int64_t count, const int8_t* a, int64_t stride, const int8_t* w, int64_t n, int64_t k, int32_t* sums) {
#define KBIT_ARGUMENTS a, stride, w, n, k, sums
    KBIT_FOR_ROWS(few_rows)
#undef KBIT_ARGUMENTS
}
void tile_packed(int64_t count, const int8_t* a, int64_t stride, const uint8_t* packed, int64_t k, int32_t* sums) {
#define KBIT_ARGUMENTS a, stride, packed, k, sums
    KBIT_FOR_ROWS(outer)
#undef KBIT_ARGUMENTS
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

// Sums of x [K] in fp32 with R rows of W, in 16 lanes that are added up in a fixed order.
template <int R> void float_dots(const float* x, const int8_t* w, int64_t k, float* out) {
    float acc[R][16] = {};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16)
        for (int r = 0; r < R; r++)
            for (int l = 0; l < 16; l++) acc[r][l] += x[i + l] * float(w[r * k + i + l]);
    for (int r = 0; r < R; r++) {
        float tail = 0.0f;
        for (int64_t j = i; j < k; j++) tail += x[j] * float(w[r * k + j]);
        for (int step = 8; step > 0; step /= 2)
            for (int l = 0; l < step; l++) acc[r][l] += acc[r][l + step];
        out[r] = acc[r][0] + tail;
    }
}
#endif

// ---- from sums to results ----

void store_tile(const Task& t, const Rows& rows, int64_t row, int64_t count, int64_t n0, int64_t n,
                const int32_t* sums, const float* outlier_weights) {
    float scale[PANEL], bias[PANEL] = {};
    for (int64_t j = 0; j < n; j++) scale[j] = t.absmax[n0 + j] * (1.0f / 127.0f);
    if (t.bias) load_floats(bias, t.bias, n0, n, t.dtype);
    for (int64_t r = 0; r < count; r += rows.planes) {
        int64_t token = (row + r) / rows.planes;
        float out[PANEL];
        if (t.mode == WEIGHT_ONLY) {
            for (int64_t j = 0; j < n; j++) out[j] = 0.0f;
            for (int p = rows.planes - 1; p >= 0; p--) {
                const int32_t* sum = sums + (r + p) * PANEL;
                uint32_t off = uint32_t(rows.sums[row + r + p]);
                for (int64_t j = 0; j < n; j++) out[j] = out[j] * 256.0f + float(int32_t(uint32_t(sum[j]) - off));
            }
            for (int64_t j = 0; j < n; j++) out[j] = out[j] * rows.scale[token] * scale[j] * rows.scale2[token];
        } else {
            const int32_t* sum = sums + r * PANEL;
            uint32_t off = uint32_t(rows.sums[row + r]);
            for (int64_t j = 0; j < n; j++)
                out[j] = float(int32_t(uint32_t(sum[j]) - off)) * rows.scale[token] * scale[j];
            if (rows.outliers) {
                float more[PANEL] = {};
                const float* x = rows.values + token * rows.outliers;
                for (int64_t c = 0; c < rows.outliers; c++)
                    for (int64_t j = 0; j < PANEL; j++) more[j] += x[c] * outlier_weights[c * PANEL + j];
                for (int64_t j = 0; j < n; j++) out[j] += more[j];
            }
        }
        if (t.bias)
            for (int64_t j = 0; j < n; j++) out[j] += bias[j];
        store_floats(out, t.out, token * t.n + n0, n, t.dtype);
    }
}

// The weights of the outlier columns, dequantized: [outliers][PANEL].
void outlier_panel(const Task& t, const Rows& rows, int64_t n0, int64_t n, float* out) {
    for (int64_t c = 0; c < rows.outliers; c++)
        for (int64_t j = 0; j < PANEL; j++)
            out[c * PANEL + j] =
                j < n ? float(t.w[(n0 + j) * t.k + rows.columns[c]]) * t.absmax[n0 + j] * (1.0f / 127.0f) : 0.0f;
}

// All panels. Returns false where memory ran out.
bool multiply(const Task& t, const Rows& rows) {
    std::atomic<bool> ok{true};
    int64_t panels = (t.n + PANEL - 1) / PANEL;
    parallel_for(panels, 1, t.threads, [&](int64_t from, int64_t to) {
        for (int64_t panel = from; panel < to; panel++) {
            int64_t n0 = panel * PANEL, n = t.n - n0 < PANEL ? t.n - n0 : PANEL;
            const int8_t* w = t.w + n0 * t.k;
            Array<float> outlier_weights(rows.outliers * PANEL);
            alignas(64) int32_t sums[TILE * PANEL];
            bool packing = false;
#if defined(KBIT_AVX512)
            packing = rows.count > TILE;
#endif
            static thread_local Scratch scratch;
            uint8_t* packed = packing ? static_cast<uint8_t*>(scratch.get(rows.stride * PANEL)) : nullptr;
            if (!outlier_weights.ok() || (packing && !packed)) {
                ok = false;
                return;
            }
            outlier_panel(t, rows, n0, n, outlier_weights.get());
#if defined(KBIT_AVX512)
            if (packing) pack(w, n, t.k, packed);
#endif
            for (int64_t row = 0; row < rows.count; row += TILE) {
                int64_t count = rows.count - row < TILE ? rows.count - row : TILE;
                const int8_t* a = rows.codes + row * rows.stride;
#if defined(KBIT_AVX512)
                if (packing) tile_packed(count, a, rows.stride, packed, t.k, sums);
                else
#endif
                    tile_few(count, a, rows.stride, w, n, t.k, sums);
                store_tile(t, rows, row, count, n0, n, sums, outlier_weights.get());
            }
        }
    });
    return ok;
}

enum Result { DONE, NO_MEMORY, NOT_FINITE };

#if defined(KBIT_AVX512)
Result weight_only(const Task& t) {
    Rows rows{};
    rows.planes = t.dtype == F32 ? 4 : t.m <= 4 ? 3 : 2;  // up to 4 tokens memory sets the time
    rows.count = t.m * rows.planes;
    rows.stride = padded(t.k);
    Array<int8_t> codes(rows.count * rows.stride);
    Array<int32_t> sums(rows.count);
    Array<float> scale(t.m), scale2(t.m), values(t.k);
    if (!codes.ok() || !sums.ok() || !scale.ok() || !scale2.ok() || !values.ok()) return NO_MEMORY;
    rows.codes = codes.get(), rows.sums = sums.get(), rows.scale = scale.get(), rows.scale2 = scale2.get();
    for (int64_t token = 0; token < t.m; token++) {
        load_floats(values.get(), t.x, token * t.k, t.k, t.dtype);
        if (!row_planes(values.get(), rows, token, t.k)) return NOT_FINITE;
        for (int p = 0; p < rows.planes; p++) finish_row(rows, token * rows.planes + p, t.k);
    }
    return multiply(t, rows) ? DONE : NO_MEMORY;
}
#else
Result weight_only(const Task& t) {
    Array<float> x(t.m * t.k);
    if (!x.ok()) return NO_MEMORY;
    load_floats(x.get(), t.x, 0, t.m * t.k, t.dtype);
    constexpr int R = 4;
    parallel_for((t.n + R - 1) / R, 8, t.threads, [&](int64_t from, int64_t to) {
        for (int64_t n = from * R; n < (to * R < t.n ? to * R : t.n); n += R) {
            int count = t.n - n < R ? int(t.n - n) : R;
            float bias[R] = {};
            if (t.bias) load_floats(bias, t.bias, n, count, t.dtype);
            for (int64_t token = 0; token < t.m; token++) {
                float out[R];
                const float* row = x.get() + token * t.k;
                if (count == R) float_dots<R>(row, t.w + n * t.k, t.k, out);
                else for (int r = 0; r < count; r++) float_dots<1>(row, t.w + (n + r) * t.k, t.k, out + r);
                for (int r = 0; r < count; r++) out[r] = out[r] * (t.absmax[n + r] * (1.0f / 127.0f)) + bias[r];
                store_floats(out, t.out, token * t.n + n, count, t.dtype);
            }
        }
    });
    return DONE;
}
#endif

// The scales, and the columns that hold an outlier.
Result llm_int8(const Task& t) {
    Rows rows{};
    rows.planes = 1;
    rows.count = t.m;
    rows.stride = padded(t.k);
    Array<int8_t> codes(rows.count * rows.stride);
    Array<int32_t> sums(rows.count);
    Array<float> scale(t.m), absmax(t.m);
    Array<uint8_t> outlier(t.k);
    Array<int64_t> columns(t.k);
    if (!codes.ok() || !sums.ok() || !scale.ok() || !absmax.ok() || !outlier.ok() || !columns.ok()) return NO_MEMORY;
    rows.codes = codes.get(), rows.sums = sums.get(), rows.scale = scale.get();
    std::memset(outlier.get(), 0, size_t(t.k));
    std::atomic<int> result{DONE};

    parallel_for(t.m, 4, t.threads, [&](int64_t from, int64_t to) {
        Array<float> values(t.k);
        if (!values.ok()) {
            result = NO_MEMORY;
            return;
        }
        float* x = values.get();
        for (int64_t token = from; token < to; token++) {
            load_floats(x, t.x, token * t.k, t.k, t.dtype);
            float most = largest(x, t.k);
            if (t.threshold > 0.0f && !(most < t.threshold)) {
                uint32_t inner = 0;
                for (int64_t i = 0; i < t.k; i++) {
                    float a = std::fabs(x[i]);
                    if (a >= t.threshold) __atomic_store_n(&outlier[i], uint8_t(1), __ATOMIC_RELAXED);
                    else inner = bits_of(a) > inner ? bits_of(a) : inner;
                }
                most = float_of(inner);
            }
            absmax[token] = most;
            if ((bits_of(most) & 0x7f800000) == 0x7f800000) result = NOT_FINITE;
        }
    });
    if (result != DONE) return Result(result.load());
    for (int64_t i = 0; i < t.k; i++)
        if (outlier[i]) columns[rows.outliers++] = i;
    Array<float> outlier_values(t.m * rows.outliers);
    if (!outlier_values.ok()) return NO_MEMORY;
    rows.columns = columns.get(), rows.values = outlier_values.get();

    parallel_for(t.m, 4, t.threads, [&](int64_t from, int64_t to) {
        Array<float> values(t.k);
        if (!values.ok()) {
            result = NO_MEMORY;
            return;
        }
        float* x = values.get();
        for (int64_t token = from; token < to; token++) {
            load_floats(x, t.x, token * t.k, t.k, t.dtype);
            for (int64_t c = 0; c < rows.outliers; c++) {
                outlier_values[token * rows.outliers + c] = x[columns[c]];
                x[columns[c]] = 0.0f;
            }
            row_codes(x, absmax[token], rows.codes + token * rows.stride, t.k);
            finish_row(rows, token, t.k);
            scale[token] = absmax[token] * (1.0f / 127.0f);
        }
    });
    if (result != DONE) return Result(result.load());
    return multiply(t, rows) ? DONE : NO_MEMORY;
}

}  // namespace

// Returns 0; 1 where memory ran out; 2 where x is not finite (in LLM_INT8: where it is no outlier), nothing being valid.
KBIT_EXPORT(int32_t, kbit_linear_8bit)(const Task* task) {
    return task->mode == LLM_INT8 ? llm_int8(*task) : weight_only(*task);
}
