// What a transformer's layers do element by element, forward and backward, in one pass over memory each. Called by kernels.py, which tells what
// is computed and why. T is float or bfloat16; sums are float. Values are rounded to T where PyTorch's own operations round them.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GLIBC__)
#pragma omp declare simd notinbranch  // by glibc's vectors of them
extern "C" float expf(float) noexcept;
#endif

namespace {

struct BFloat16 {
    uint16_t bits;
};

inline float wide(float value) { return value; }

inline float wide(BFloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void put(float &place, float value) { place = value; }

inline void put(BFloat16 &place, float value) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    place.bits = uint16_t(value != value ? 0x7fc0u : nearest);
}

template <class T> inline float rounded(float value) {
    T result;
    put(result, value);
    return wide(result);
}

inline float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

template <class T> void rms_norm(const T *x, const T *weight, T *out, float *scale, float epsilon, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *in = x + row * width;
        T *to = out + row * width;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += wide(in[i]) * wide(in[i]);
        const float by = 1.0f / std::sqrt(squares / float(width) + epsilon);
        scale[row] = by;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) put(to[i], wide(weight[i]) * rounded<T>(wide(in[i]) * by));
    }
}

// Each thread adds its rows' gradients of the weight to a line of its own of grad_weight [threads, width].
template <class T>
void rms_norm_backward(const T *grad, const T *x, const T *weight, const float *scale, T *grad_x, float *grad_weight, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        float *sums = grad_weight + thread * width;
        for (int64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; ++row) {
            const T *from = grad + row * width, *in = x + row * width;
            T *to = grad_x + row * width;
            const float by = scale[row];
            float along = 0.0f;
#pragma omp simd reduction(+ : along)
            for (int64_t i = 0; i < width; ++i) {
                sums[i] += wide(from[i]) * rounded<T>(wide(in[i]) * by);
                along += rounded<T>(wide(from[i]) * wide(weight[i])) * wide(in[i]);
            }
            const float back = along / float(width) * by * by * by;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) put(to[i], rounded<T>(wide(from[i]) * wide(weight[i])) * by - wide(in[i]) * back);
        }
    }
}

template <class T> void swiglu(const T *gate, const T *up, T *out, int64_t count, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < count; ++i) put(out[i], rounded<T>(wide(gate[i]) * sigmoid(wide(gate[i]))) * wide(up[i]));
}

template <class T> void swiglu_backward(const T *grad, const T *gate, const T *up, T *grad_gate, T *grad_up, int64_t count, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < count; ++i) {
        const float x = wide(gate[i]), open = sigmoid(x), from = wide(grad[i]);
        put(grad_up[i], from * rounded<T>(x * open));
        put(grad_gate[i], rounded<T>(from * wide(up[i])) * open * (1.0f + x * (1.0f - open)));
    }
}

// x and out [batch, heads, length, width] by the strides given; cosines and sines [length, width], one such table a row of the batch or one for all.
// Backward is the same with the sines' sign and halves turned.
template <class T>
void rotate(const T *x, const T *cosines, const T *sines, T *out, int64_t batch, int64_t heads, int64_t length, int64_t width, const int64_t *from_strides,
            const int64_t *to_strides, int64_t table_stride, int backward, int threads) {
    const int64_t half = width / 2;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t row = 0; row < batch; ++row) {
        for (int64_t place = 0; place < length; ++place) {
            const T *cosine = cosines + row * table_stride + place * width, *sine = sines + row * table_stride + place * width;
            for (int64_t head = 0; head < heads; ++head) {
                const T *in = x + row * from_strides[0] + head * from_strides[1] + place * from_strides[2];
                T *to = out + row * to_strides[0] + head * to_strides[1] + place * to_strides[2];
                if (backward) {
#pragma omp simd
                    for (int64_t i = 0; i < half; ++i) {
                        const float low = wide(in[i]), high = wide(in[i + half]);
                        put(to[i], rounded<T>(low * wide(cosine[i])) + rounded<T>(high * wide(sine[i + half])));
                        put(to[i + half], rounded<T>(high * wide(cosine[i + half])) - rounded<T>(low * wide(sine[i])));
                    }
                } else {
#pragma omp simd
                    for (int64_t i = 0; i < half; ++i) {
                        const float low = wide(in[i]), high = wide(in[i + half]);
                        put(to[i], rounded<T>(low * wide(cosine[i])) - rounded<T>(high * wide(sine[i])));
                        put(to[i + half], rounded<T>(high * wide(cosine[i + half])) + rounded<T>(low * wide(sine[i + half])));
                    }
                }
            }
        }
    }
}

// logps[row] = logits[row, target] - total[row], total[row] = log(sum(exp(logits[row])))
template <class T> void target_logps(const T *logits, const int64_t *targets, float *logps, float *total, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *in = logits + row * width;
        float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < width; ++i) most = wide(in[i]) > most ? wide(in[i]) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) sum += expf(wide(in[i]) - most);
        total[row] = most + std::log(sum);
        logps[row] = wide(in[targets[row]]) - total[row];
    }
}

template <class T>
void target_logps_backward(const float *grad, const T *logits, const int64_t *targets, const float *total, T *grad_logits, int64_t rows, int64_t width,
                           int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *in = logits + row * width;
        T *to = grad_logits + row * width;
        const float by = grad[row], of = total[row];
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) put(to[i], -by * expf(wide(in[i]) - of));
        put(to[targets[row]], by * (1.0f - std::exp(wide(in[targets[row]]) - of)));
    }
}

}  // namespace

// One C function a template and type: NAME_float and NAME_bfloat16, which the compiler derives from the template's own arguments.
#define BOTH(NAME)                                                       \
    extern "C" {                                                         \
    extern const void *const NAME##_float;                               \
    extern const void *const NAME##_bfloat16;                            \
    const void *const NAME##_float = (const void *)&NAME<float>;         \
    const void *const NAME##_bfloat16 = (const void *)&NAME<BFloat16>;   \
    }

BOTH(rms_norm)
BOTH(rms_norm_backward)
BOTH(swiglu)
BOTH(swiglu_backward)
BOTH(rotate)
BOTH(target_logps)
BOTH(target_logps_backward)
