// Products with an int8 weight W [N, K] that has one scale a row: out [M, N] = x [M, K] @ W^T.
//
// LLM_INT8     x is quantized to int8 by rows, but for the columns that hold an outlier; those are multiplied in fp32.
// WEIGHT_ONLY  x counts as it is. AVX512 multiplies it in integers too: a token is scaled to an integer of 22 bits (16 from
//              5 tokens on; for fp32 30 up to 2 tokens), which is cut into 3 (2, 4) signed bytes, the planes. Each plane is
//              a row of int8 activations; sums are exact. What is lost is 2^-23 (2^-16, 2^-31) of the token's largest value.
//
// Threads take panels of PANEL rows of W; int8_dots.h multiplies them.

#include "int8_dots.h"

namespace {

constexpr int64_t STRETCH = 256;  // activations that are converted at once
enum Mode { WEIGHT_ONLY, LLM_INT8 };

struct Task {
    const void* x;        // [M, K] contiguous
    const int8_t* w;      // [N, K] contiguous
    const float* absmax;  // [N]
    const void* bias;     // [N], or null
    void* out;            // [M, N] contiguous
    int64_t m, n, k;
    int64_t most_outliers;  // with more outlier columns LLM_INT8 takes x as it is
    float threshold;      // magnitude from which a column is an outlier; 0: none
    int32_t dtype;        // of x, bias and out
    int32_t mode, threads;
};

// Activations as rows of int8.
struct Rows {
    int planes;            // rows a token
    int64_t count, stride;  // rows, bytes of each: zeros after K
    int64_t tile;          // rows a tile of int8_dots.h, whole tokens; 0: rows lie one behind the other
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

// The same for magnitudes below threshold; marks the columns of the others.
float largest_inner(const float* x, int64_t n, float threshold, uint8_t* outlier) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        float a = std::fabs(x[i]);
        if (a >= threshold) __atomic_store_n(&outlier[i], uint8_t(1), __ATOMIC_RELAXED);
        else most = bits_of(a) > most ? bits_of(a) : most;
    }
    return float_of(most);
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
// One token as planes, `codes` [planes, stride]. Returns false where it is not finite.
bool row_planes(const float* x, Rows& rows, int64_t token, int8_t* codes, int64_t k) {
    float most = largest(x, k);
    if ((bits_of(most) & 0x7f800000) == 0x7f800000) return false;
    int exponent = most == 0.0f ? 0 : std::ilogb(most);
    // The largest magnitude becomes less than 2^30 or 2^22 by a power of two, or what two planes can hold just so.
    float top = rows.planes == 2 ? 32639.0f / std::ldexp(most == 0.0f ? 1.0f : most, -exponent) : 1.0f;
    int shift = (rows.planes == 4 ? 29 : rows.planes == 3 ? 21 : 0) - exponent, half = shift / 2;
    __m512 first = _mm512_set1_ps(std::ldexp(1.0f, half)), second = _mm512_set1_ps(std::ldexp(top, shift - half));
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

void finish_row(Rows& rows, int64_t row, int8_t* codes, int64_t k) {
    std::memset(codes + k, 0, size_t(rows.stride - k));
    int32_t sum = 0;
#if defined(KBIT_AVX512)
    for (int64_t i = 0; i < k; i++) sum += codes[i];
#endif
    rows.sums[row] = int32_t(uint32_t(sum) * 128u);
}

// Sets how rows of m tokens lie, but for their memory.
void lay_out(Rows& rows, int64_t m, int64_t k, int planes) {
    rows.planes = planes;
    rows.count = m * planes;
    rows.stride = padded(k);
#if defined(KBIT_AVX512)
    if (rows.count > FEW) {
        int64_t most = TILE / planes, tiles = (m + most - 1) / most;
        rows.tile = (m + tiles - 1) / tiles * planes;
    }
#endif
}

// Calls fill(token, room for K values, codes [planes, stride]) for every token, and brings codes where they belong.
// Returns false where memory ran out.
template <class F> bool fill_rows(const Task& t, Rows& rows, const F& fill) {
    std::atomic<bool> ok{true};
    int64_t most = rows.tile ? rows.tile / rows.planes : 2;  // tokens at once
    parallel_for((t.m + most - 1) / most, 1, t.threads, [&](int64_t from, int64_t to) {
        Array<float> values(t.k);
        Array<int8_t> tile(rows.tile * rows.stride);
        if (!values.ok() || !tile.ok()) {
            ok = false;
            return;
        }
        for (int64_t first = from * most; first < (to * most < t.m ? to * most : t.m); first += most) {
            int64_t tokens = t.m - first < most ? t.m - first : most;
            int8_t* place = rows.codes + first * rows.planes * rows.stride;
            int8_t* codes = rows.tile ? tile.get() : place;
            for (int64_t i = 0; i < tokens; i++) {
                int8_t* own = codes + i * rows.planes * rows.stride;
                fill(first + i, values.get(), own);
                for (int p = 0; p < rows.planes; p++)
                    finish_row(rows, (first + i) * rows.planes + p, own + p * rows.stride, t.k);
            }
#if defined(KBIT_AVX512)
            if (rows.tile) interleave(codes, tokens * rows.planes, rows.stride, place);
#endif
        }
    });
    return ok;
}

// ---- from sums to results ----

void store_tile(const Task& t, const Rows& rows, int64_t row, int64_t count, int64_t n0, int64_t n,
                const int32_t* sums, const float* outlier_weights) {
    float scale[PANEL], bias[PANEL] = {};
    for (int64_t j = 0; j < n; j++) scale[j] = t.absmax[n0 + j] * (1.0f / 127.0f);
    if (t.bias) load_floats(bias, t.bias, n0, n, t.dtype);
    for (int64_t r = 0; r < count; r += rows.planes) {
        int64_t token = (row + r) / rows.planes;
        float out[PANEL];
        // Rows of the result are on pages of their own; a store would wait for each.
        if (token + 12 < t.m)
            __builtin_prefetch(static_cast<char*>(t.out) + ((token + 12) * t.n + n0) * element_size(t.dtype), 1);
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
    int64_t grain = panels >= 8 * t.threads ? 2 : 1;
    parallel_for(panels, grain, t.threads, [&](int64_t from, int64_t to) {
        for (int64_t panel = from; panel < to; panel++) {
            int64_t n0 = panel * PANEL, n = t.n - n0 < PANEL ? t.n - n0 : PANEL;
            const int8_t* w = t.w + n0 * t.k;
            Array<float> outlier_weights(rows.outliers * PANEL);
#if defined(KBIT_AVX512)
            const int64_t at_once = rows.count, room = rows.tile ? CHUNK * PANEL : 0;
#else
            const int64_t at_once = rows.count < TILE ? rows.count : TILE, room = 0;
#endif
            static thread_local Scratch scratch;
            int32_t* sums = static_cast<int32_t*>(scratch.get(at_once * PANEL * int64_t(sizeof(int32_t)) + room));
            if (!outlier_weights.ok() || !sums) {
                ok = false;
                return;
            }
            outlier_panel(t, rows, n0, n, outlier_weights.get());
            for (int64_t row = 0; row < rows.count; row += at_once) {
                int64_t count = rows.count - row < at_once ? rows.count - row : at_once;
#if defined(KBIT_AVX512)
                int64_t next = panel + 1 < to ? panel + 1 : to + (t.threads - 1) * grain;
                if (rows.tile)
                    many_rows(rows.count, rows.tile, rows.codes, rows.stride, w, n, t.k,
                              t.w + (next < panels ? next : panel) * PANEL * t.k,
                              reinterpret_cast<uint8_t*>(sums + at_once * PANEL), sums);
                else
#endif
                    tile_few(count, rows.codes + row * rows.stride, rows.stride, w, n, t.k, sums);
                store_tile(t, rows, row, count, n0, n, sums, outlier_weights.get());
            }
        }
    });
    return ok;
}

enum Result { DONE, NO_MEMORY, NOT_FINITE, TOO_MANY };

#if defined(KBIT_AVX512)
Result weight_only(const Task& t) {
    Rows rows{};
    // Up to 4 tokens memory sets the time.
    lay_out(rows, t.m, t.k, t.dtype == F32 ? (t.m <= 2 ? 4 : 3) : t.m <= 4 ? 3 : 2);
    Array<int8_t> codes(rows.count * rows.stride);
    Array<int32_t> sums(rows.count);
    Array<float> scale(t.m), scale2(t.m);
    if (!codes.ok() || !sums.ok() || !scale.ok() || !scale2.ok()) return NO_MEMORY;
    rows.codes = codes.get(), rows.sums = sums.get(), rows.scale = scale.get(), rows.scale2 = scale2.get();
    std::atomic<bool> finite{true};
    bool ok = fill_rows(t, rows, [&](int64_t token, float* x, int8_t* own) {
        load_floats(x, t.x, token * t.k, t.k, t.dtype);
        if (!row_planes(x, rows, token, own, t.k)) finite = false;
    });
    if (!ok) return NO_MEMORY;
    if (!finite) return NOT_FINITE;
    return multiply(t, rows) ? DONE : NO_MEMORY;
}
#else
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
    lay_out(rows, t.m, t.k, 1);
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
        float x[STRETCH];
        for (int64_t token = from; token < to; token++) {
            uint32_t bits = 0;
            for (int64_t begin = 0; begin < t.k; begin += STRETCH) {
                int64_t n = begin + STRETCH < t.k ? STRETCH : t.k - begin;
                load_floats(x, t.x, token * t.k + begin, n, t.dtype);
                float some = largest(x, n);
                if (t.threshold > 0.0f && !(some < t.threshold))
                    some = largest_inner(x, n, t.threshold, outlier.get() + begin);
                bits = bits_of(some) > bits ? bits_of(some) : bits;
            }
            float most = float_of(bits);
            absmax[token] = most;
            if ((bits_of(most) & 0x7f800000) == 0x7f800000) result = NOT_FINITE;
        }
    });
    if (result != DONE) return Result(result.load());
    for (int64_t i = 0; i < t.k; i++)
        if (outlier[i]) columns[rows.outliers++] = i;
    if (rows.outliers > t.most_outliers) {
#if defined(KBIT_AVX512)
        Task plain = t;
        plain.mode = WEIGHT_ONLY;
        return weight_only(plain);
#else
        return TOO_MANY;
#endif
    }
    Array<float> outlier_values(t.m * rows.outliers);
    if (!outlier_values.ok()) return NO_MEMORY;
    rows.columns = columns.get(), rows.values = outlier_values.get();

    bool ok = fill_rows(t, rows, [&](int64_t token, float* x, int8_t* own) {
        int64_t c = 0;
        for (int64_t begin = 0; begin < t.k; begin += STRETCH) {
            int64_t n = begin + STRETCH < t.k ? STRETCH : t.k - begin;
            load_floats(x, t.x, token * t.k + begin, n, t.dtype);
            for (; c < rows.outliers && columns[c] < begin + n; c++) {
                outlier_values[token * rows.outliers + c] = x[columns[c] - begin];
                x[columns[c] - begin] = 0.0f;
            }
            row_codes(x, absmax[token], own + begin, n);
        }
        scale[token] = absmax[token] * (1.0f / 127.0f);
    });
    if (!ok) return NO_MEMORY;
    return multiply(t, rows) ? DONE : NO_MEMORY;
}

}  // namespace

// Returns 0; 1 where memory ran out; 2 where x is not finite (in LLM_INT8: where it is no outlier); 3 where there are more
// outlier columns than this machine multiplies fast. Nothing is valid but with 0.
KBIT_EXPORT(int32_t, kbit_linear_8bit)(const Task* task) {
    return task->mode == LLM_INT8 ? llm_int8(*task) : weight_only(*task);
}
