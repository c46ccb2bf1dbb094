// What does not depend on the instruction set: which levels this machine can run, and threads.

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

using Body = void (*)(void*);
using GompParallel = void (*)(Body, void*, unsigned threads, unsigned flags);

std::atomic<GompParallel> gomp{nullptr};

}  // namespace

#define KBIT_VISIBLE extern "C" __attribute__((visibility("default")))

// Whether this machine runs a level: the numbers of build.LEVELS.
KBIT_VISIBLE int32_t kbit_cpu_supports(int32_t level) {
    if (level == 0) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512vnni");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                __builtin_cpu_supports("avx512bf16");
    return level == 1 ? avx2 : level == 2 ? avx512 : level == 3 ? bf16 : 0;
#elif defined(__aarch64__) && defined(__linux__)
    unsigned long has = getauxval(AT_HWCAP);
    return level == 1 && (has >> 20 & 1) && (has >> 10 & 1);  // ASIMDDP and ASIMDHP
#elif defined(__aarch64__) && defined(__APPLE__)
    return level == 1;  // every Apple CPU that runs 64-bit macOS
#else
    return 0;
#endif
}

// GOMP_parallel of the OpenMP runtime that the process uses anyway, or null: then threads are started for each call.
KBIT_VISIBLE void kbit_set_parallel(void* function) {
    gomp = reinterpret_cast<GompParallel>(function);
#if !defined(_WIN32)
    // The workers of a parent do not exist in its child, and libgomp would wait for them for ever.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { gomp = nullptr; });
    (void)registered;
#endif
}

// Runs body(data) on up to `threads` threads at once, this one among them. The body shares out the work itself, so that
// it is done whatever number of threads there was.
KBIT_VISIBLE void kbit_parallel(Body body, void* data, int32_t threads) {
    if (threads <= 1) return body(data);
    if (GompParallel parallel = gomp) return parallel(body, data, unsigned(threads), 0);
    std::vector<std::thread> others;
    try {
        for (int32_t i = 1; i < threads; i++) others.emplace_back(body, data);
    } catch (...) {  // no more threads or memory: those that run do all of it
    }
    body(data);
    for (auto& thread : others) thread.join();
}
