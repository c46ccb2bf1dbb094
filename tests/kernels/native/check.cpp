// Checks the CPU kernels of one level against the definitions, without Python: for machines that are emulated.
// Buffers have exactly the size that a kernel may touch, and begin off any alignment but that of their elements.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define CALL(name) JOIN(name, KBIT_SUFFIX)

struct Task {
    const void* x;
    const int8_t* w;
    const float* absmax;
    const void* bias;
    void* out;
    int64_t m, n, k, most_outliers;
    float threshold;
    int32_t dtype, mode, threads;
};
extern "C" {
int32_t CALL(kbit_linear_8bit)(const Task*);
void CALL(kbit_quantize_4bit)(const void*, int32_t, int64_t, int64_t, const float*, const uint8_t*, int32_t, uint8_t*, float*, int32_t);
int32_t CALL(kbit_quantize_int8)(const void*, int32_t, int64_t, int64_t, int8_t*, float*, int32_t);
void CALL(kbit_dequantize_int8)(const int8_t*, const float*, int64_t, int64_t, void*, int32_t, int32_t);
}

static std::mt19937 engine(1);
static int failures = 0;

static void expect(bool good, const char* what, long a, long b) {
    if (good) return;
    std::printf("FAILED %s (%ld, %ld)\n", what, a, b);
    failures++;
}
static std::vector<float> normal(size_t n) {
    std::normal_distribution<float> draw;
    std::vector<float> x(n);
    for (float& v : x) v = draw(engine);
    return x;
}

static void quantize_4bit(int64_t count, int64_t block) {
    const float values[16] = {-1.0f, -0.6961928f, -0.5250731f, -0.3949175f, -0.2844414f, -0.1847734f, -0.0910500f, 0.0f,
                              0.0795803f, 0.1609302f, 0.2461123f, 0.3379152f, 0.4407098f, 0.5626170f, 0.7229568f, 1.0f};
    float midpoints[15];
    uint8_t codes[16];
    for (int i = 0; i < 15; i++) midpoints[i] = (values[i] + values[i + 1]) / 2;
    for (int i = 0; i < 16; i++) codes[i] = uint8_t(i);
    std::vector<float> x = normal(count), absmax((count + block - 1) / block);
    std::vector<uint8_t> packed((count + 1) / 2);
    CALL(kbit_quantize_4bit)(x.data(), 0, count, block, midpoints, codes, 7, packed.data(), absmax.data(), 2);
    for (int64_t i = 0; i < count; i++) {
        int64_t begin = i / block * block, end = begin + block < count ? begin + block : count;
        float most = 0.0f;
        for (int64_t j = begin; j < end; j++) most = std::fmax(most, std::fabs(x[j]));
        float scaled = end - begin == block ? x[i] * (1.0f / most) : x[i] / most;
        int rank = 0;
        for (float m : midpoints) rank += scaled > m;
        int code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
        expect(code == rank && absmax[i / block] == most, "quantize_4bit", count, i);
    }
    if (count % 2) expect((packed.back() & 15) == 7, "padding", count, block);
}

static void linear_8bit(int64_t m, int64_t n, int64_t k, int mode) {
    std::vector<float> weight = normal(n * k), x = normal(m * k), bias = normal(n), absmax(n), out(m * n, NAN), decoded(n * k);
    std::vector<int8_t> codes(n * k);
    if (k > 2)
        for (int64_t i = 0; i < m; i++) x[i * k + 1] *= 30;
    expect(CALL(kbit_quantize_int8)(weight.data(), 0, n, k, codes.data(), absmax.data(), 2) == 0, "quantize_int8", n, k);
    CALL(kbit_dequantize_int8)(codes.data(), absmax.data(), n, k, decoded.data(), 0, 2);
    for (int64_t i = 0; i < n * k; i++) {
        expect(std::fabs(decoded[i] - weight[i]) <= absmax[i / k] * 0.5001f / 127, "int8 round trip", n, k);
        expect(decoded[i] == float(codes[i]) * absmax[i / k] * (1.0f / 127.0f), "dequantize_int8", n, k);
    }
    Task task{x.data(), codes.data(), absmax.data(), bias.data(), out.data(), m, n, k, k, 6.0f, 0, mode, 2};
    expect(CALL(kbit_linear_8bit)(&task) == 0, "linear_8bit", m, n);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double exact = bias[j], size = std::fabs(bias[j]);
            for (int64_t c = 0; c < k; c++) {
                exact += double(x[i * k + c]) * decoded[j * k + c];
                size += std::fabs(double(x[i * k + c]) * decoded[j * k + c]);
            }
            double slack = mode ? 0.03 * absmax[j] * std::sqrt(double(k)) + 1e-5 * size : 1e-5 * size;
            expect(std::fabs(out[i * n + j] - exact) <= slack + 1e-6, mode ? "llm_int8" : "weight_only", i, j);
        }
}

int main() {
    for (int64_t count : {1, 2, 31, 64, 65, 255, 4096, 4097, 10001})
        for (int64_t block : {32, 64, 4096}) quantize_4bit(count, block);
    for (int mode : {0, 1})
        for (int64_t m : {1, 3, 13})
            for (int64_t n : {1, 31, 70})
                for (int64_t k : {1, 17, 64, 300}) linear_8bit(m, n, k, mode);
    for (int mode : {0, 1}) linear_8bit(30, 40, 1100, mode);
    std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures != 0;
}
