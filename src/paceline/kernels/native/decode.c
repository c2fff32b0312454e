/* The operations of one decoded token on a CPU: each reads its operands once, at the rate of memory.
 *
 * Vectors are the compiler's own (GCC and Clang), so that the source is the same for every CPU.
 * bfloat16 is the upper half of a float32; sums are in float32. Every function exists for both.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline float read_f32(float value) { return value; }

static inline float read_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline float round_f32(float value) { return value; }

/* To the nearest, ties to even, as torch rounds. */
static inline uint16_t round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline vec load_f32(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline vec load_bf16(const uint16_t *from) {
    halves value;
    memcpy(&value, from, sizeof value);
    return (vec)(__builtin_convertvector(value, words) << 16);
}

static inline float total(vec value) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
}

static float silu(float x) { return x / (1.0f + expf(-x)); }

/* The tangent's approximation, as torch's gelu(approximate="tanh"). */
static float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

/* One dot product of `width` values, four sums at a time: one alone would wait for itself. */
#define DOT(NAME, TYPE)                                                                          \
    static inline float dot_##NAME(const TYPE *left, const float *right, long width) {            \
        vec sums[4] = {0};                                                                       \
        long at = 0;                                                                             \
        for (; at + 4 * LANES <= width; at += 4 * LANES)                                         \
            for (int part = 0; part < 4; part++)                                                 \
                sums[part] +=                                                                    \
                    load_##NAME(left + at + part * LANES) * load_f32(right + at + part * LANES);  \
        for (; at + LANES <= width; at += LANES)                                                 \
            sums[0] += load_##NAME(left + at) * load_f32(right + at);                            \
        float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));                            \
        for (; at < width; at++) sum += read_##NAME(left[at]) * right[at];                       \
        return sum;                                                                              \
    }

/* y = W x + b. */
#define LINEAR(NAME, TYPE)                                                                       \
    void linear_##NAME(const TYPE *weight, const TYPE *bias, const TYPE *x, TYPE *y, long rows,   \
                       long width, int threads) {                                                \
        float *wide = malloc(width * sizeof(float));                                             \
        for (long at = 0; at < width; at++) wide[at] = read_##NAME(x[at]);                       \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")       \
        for (long row = 0; row < rows; row++) {                                                  \
            float sum = dot_##NAME(weight + row * width, wide, width);                           \
            y[row] = round_##NAME(bias ? sum + read_##NAME(bias[row]) : sum);                    \
        }                                                                                        \
        free(wide);                                                                              \
    }

/* Root-mean-square norm of each row. An offset is added to the weight before it is rounded. */
#define RMS_NORM(NAME, TYPE)                                                                     \
    void rms_norm_##NAME(const TYPE *x, const TYPE *weight, TYPE *y, long rows, long width,       \
                         float eps, float offset) {                                              \
        for (long row = 0; row < rows; row++, x += width, y += width) {                          \
            float square = 0;                                                                    \
            for (long at = 0; at < width; at++) square += read_##NAME(x[at]) * read_##NAME(x[at]); \
            float scale = 1.0f / sqrtf(square / width + eps);                                    \
            for (long at = 0; at < width; at++) {                                                \
                float normed = read_##NAME(x[at]) * scale;                                       \
                if (offset == 0) normed = read_##NAME(round_##NAME(normed));                     \
                y[at] = round_##NAME(normed * (read_##NAME(weight[at]) + offset));               \
            }                                                                                    \
        }                                                                                        \
    }

/* Turns the halves of each row against each other. */
#define ROTATE(NAME, TYPE)                                                                       \
    void rotate_##NAME(const TYPE *x, const TYPE *cosine, const TYPE *sine, TYPE *y, long rows,   \
                       long width) {                                                             \
        long half = width / 2;                                                                   \
        for (long row = 0; row < rows; row++, x += width, y += width)                            \
            for (long at = 0; at < half; at++) {                                                 \
                float first = read_##NAME(x[at]), second = read_##NAME(x[at + half]);            \
                y[at] = round_##NAME(first * read_##NAME(cosine[at]) -                           \
                                     second * read_##NAME(sine[at]));                            \
                y[at + half] = round_##NAME(second * read_##NAME(cosine[at + half]) +            \
                                            first * read_##NAME(sine[at + half]));               \
            }                                                                                    \
    }

/* Softmax(scale q k^T) v of one query for each head over all keys, heads in groups. */
#define ATTEND(NAME, TYPE)                                                                       \
    void attend_##NAME(const TYPE *q, const TYPE *k, const TYPE *v, TYPE *out, long keys,         \
                       long heads, long kv_heads, long width, float scale, int threads) {        \
        long stride = kv_heads * width;                                                          \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")       \
        for (long head = 0; head < heads; head++) {                                              \
            long start = head / (heads / kv_heads) * width;                                      \
            float *query = malloc((2 * width + keys) * sizeof(float));                           \
            float *sums = query + width, *scores = sums + width;                                 \
            for (long at = 0; at < width; at++)                                                  \
                query[at] = scale * read_##NAME(q[head * width + at]), sums[at] = 0;             \
            float highest = -INFINITY, weights = 0;                                              \
            for (long key = 0; key < keys; key++) {                                              \
                scores[key] = dot_##NAME(k + key * stride + start, query, width);                \
                if (scores[key] > highest) highest = scores[key];                                \
            }                                                                                    \
            for (long key = 0; key < keys; key++) scores[key] = expf(scores[key] - highest);     \
            for (long key = 0; key < keys; key++) {                                              \
                const TYPE *value = v + key * stride + start;                                    \
                weights += scores[key];                                                          \
                for (long at = 0; at < width; at++)                                              \
                    sums[at] += scores[key] * read_##NAME(value[at]);                            \
            }                                                                                    \
            for (long at = 0; at < width; at++)                                                  \
                out[head * width + at] = round_##NAME(sums[at] / weights);                       \
            free(query);                                                                         \
        }                                                                                        \
    }

/* act(gate) * up, the gate being the first half of x. */
#define GATE(NAME, TYPE, ACT)                                                                    \
    void gate_##ACT##_##NAME(const TYPE *x, TYPE *y, long width) {                               \
        for (long at = 0; at < width; at++) {                                                    \
            float gate = read_##NAME(round_##NAME(ACT(read_##NAME(x[at]))));                     \
            y[at] = round_##NAME(gate * read_##NAME(x[width + at]));                             \
        }                                                                                        \
    }

#define ALL(NAME, TYPE)                                                                          \
    DOT(NAME, TYPE)                                                                              \
    LINEAR(NAME, TYPE)                                                                           \
    RMS_NORM(NAME, TYPE)                                                                         \
    ROTATE(NAME, TYPE)                                                                           \
    ATTEND(NAME, TYPE)                                                                           \
    GATE(NAME, TYPE, silu)                                                                       \
    GATE(NAME, TYPE, gelu_tanh)

ALL(f32, float)
ALL(bf16, uint16_t)
