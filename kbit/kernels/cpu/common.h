// What every kernel source shares. Such a source is compiled once for each instruction set (KBIT_LEVEL, see build.py).
//
// One rule follows: everything is in an anonymous namespace, and nothing that leaves a weak symbol is used (std::vector,
// std::thread, std::sort ...). Of several copies of a weak function the linker keeps one, and it may be the one that
// needs AVX512. What needs them lives in platform.cpp. tests/kernels/test_cpu_library.py looks at the symbols.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// x86: 1 AVX2, FMA, F16C, BMI2; 2 AVX512 F, BW, DQ, VL, VNNI; 3 also VBMI, VBMI2, BF16. ARM: 1 dot product, fp16.
#if !defined(KBIT_LEVEL)
#error "compile with -DKBIT_LEVEL=... -DKBIT_SUFFIX=..., see build.py"
#endif
#if defined(__x86_64__) && KBIT_LEVEL >= 1
#define KBIT_AVX2 1
#include <immintrin.h>
#endif
#if defined(__x86_64__) && KBIT_LEVEL >= 2
#define KBIT_AVX512 1
#endif
#if defined(__x86_64__) && KBIT_LEVEL >= 3
#define KBIT_AVX512BF16 1
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__aarch64__) && KBIT_LEVEL >= 1
#define KBIT_DOTPROD 1
#endif

// KBIT_EXPORT(int32_t, kbit_add)(int32_t a) {...} defines kbit_add_avx2 and so on.
#define KBIT_JOIN_(a, b) a##_##b
#define KBIT_JOIN(a, b) KBIT_JOIN_(a, b)
#define KBIT_EXPORT(type, name) \
    extern "C" __attribute__((visibility("default"))) type KBIT_JOIN(name, KBIT_SUFFIX)

extern "C" __attribute__((visibility("default"))) void kbit_parallel(void (*body)(void*), void* data, int32_t threads);

namespace {

enum Dtype { F32, BF16, F16 };  // numbers of kbit.kernels.cpu.library.DTYPES

inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

inline float from_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }
inline uint16_t to_bf16(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

#if defined(KBIT_AVX2)
inline float from_f16(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t to_f16(float x) { return _cvtss_sh(x, 0); }
#elif defined(__aarch64__)
inline float from_f16(uint16_t h) { __fp16 x; std::memcpy(&x, &h, 2); return float(x); }
inline uint16_t to_f16(float x) { __fp16 y = __fp16(x); uint16_t h; std::memcpy(&h, &y, 2); return h; }
#else
inline float from_f16(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // Scaling by 2^112 rebiases the exponent and makes subnormals right.
    return float_of(sign | bits_of(float_of(rest << 13) * 5.192296858534828e33f));
}
inline uint16_t to_f16(float x) {
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (a >= 0x47800000) return uint16_t(sign | 0x7c00);
    if (a < 0x38800000)  // subnormal: let the float adder round at the right place
        return uint16_t(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000));
    return uint16_t(sign | ((a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13));
}
#endif

inline int64_t element_size(int dtype) { return dtype == F32 ? 4 : 2; }

// n values of `dtype`, from element `begin` of an array, as floats.
inline void load_floats(float* out, const void* base, int64_t begin, int64_t n, int dtype) {
    if (n <= 0) return;
    if (dtype == F32) {
        std::memcpy(out, static_cast<const float*>(base) + begin, size_t(n) * sizeof(float));
        return;
    }
    const uint16_t* in = static_cast<const uint16_t*>(base) + begin;
    int64_t i = 0;
    if (dtype == BF16) {
        for (; i < n; i++) out[i] = from_bf16(in[i]);
        return;
    }
#if defined(KBIT_AVX512)
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#elif defined(KBIT_AVX2)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
    for (; i < n; i++) out[i] = from_f16(in[i]);
}

// The inverse: every value rounded once, to the nearest even.
inline void store_floats(const float* values, void* base, int64_t begin, int64_t n, int dtype) {
    if (n <= 0) return;
    if (dtype == F32) {
        std::memcpy(static_cast<float*>(base) + begin, values, size_t(n) * sizeof(float));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(base) + begin;
    int64_t i = 0;
    if (dtype == BF16) {
        for (; i < n; i++) out[i] = to_bf16(values[i]);
        return;
    }
#if defined(KBIT_AVX512)
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(values + i), 0));
#elif defined(KBIT_AVX2)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), 0));
#endif
    for (; i < n; i++) out[i] = to_f16(values[i]);
}

// Memory on cache lines, freed at the end of the scope; not initialized. `ok()` is false where there was none.
template <class T> class Array {
  public:
    explicit Array(int64_t count) {
        size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    }
    ~Array() { std::free(data_); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    bool ok() const { return data_ != nullptr; }
    T* get() { return data_; }
    T& operator[](int64_t i) { return data_[i]; }

  private:
    T* data_;
};

// Memory of one thread that is kept from call to call: fresh pages would cost more than filling them.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    // At least `bytes`, on a page; null where there is no memory. What was there before is gone.
    void* get(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(4096, size_t(size_));
            if (!data_) size_ = 0;
        }
        return data_;
    }

  private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

// Runs work(begin, end) over [0, units), in pieces of `grain`; threads take the next piece when they are free.
template <class F> void parallel_for(int64_t units, int64_t grain, int64_t threads, const F& work) {
    struct Shared {
        const F* work;
        std::atomic<int64_t> next;
        int64_t units, grain;
    } shared;
    shared.work = &work;
    shared.next.store(0, std::memory_order_relaxed);
    shared.units = units;
    shared.grain = grain < 1 ? 1 : grain;
    int64_t pieces = (units + shared.grain - 1) / shared.grain;
    if (pieces <= 0) return;
    void (*body)(void*) = [](void* data) {
        Shared& s = *static_cast<Shared*>(data);
        for (int64_t i; (i = s.next.fetch_add(s.grain, std::memory_order_relaxed)) < s.units;)
            (*s.work)(i, i + s.grain < s.units ? i + s.grain : s.units);
    };
    kbit_parallel(body, &shared, int32_t(threads < pieces ? threads : pieces));
}

}  // namespace
