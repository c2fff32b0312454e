/* The small operations of a step: each reads its operands once, in as many threads as are worth it.
 * Also attention of one query over one sequence whose keys lie one after the other.
 */
#include "vectors.h"

/* The tangent's approximation, as torch's gelu(approximate="tanh"). */
static float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

/* Root-mean-square norm of each row. An offset is added to the weight before it is rounded. */
#define RMS_NORM(NAME, TYPE)                                                                     \
    INLINE float squares_##NAME(const TYPE *x, long width) {                                     \
        vec sums = {0};                                                                          \
        long at = 0;                                                                             \
        for (; at + STEP <= width; at += STEP) {                                                 \
            vec first, second;                                                                   \
            halves_##NAME(x + at, &first, &second);                                              \
            sums = multiplied(sums, first, first);                                                              \
            sums = multiplied(sums, second, second);                                                            \
        }                                                                                        \
        float sum = total(sums);                                                                 \
        for (; at < width; at++) sum += read_##NAME(x[at]) * read_##NAME(x[at]);                 \
        return sum;                                                                              \
    }                                                                                            \
    void rms_norm_##NAME(const TYPE *x, const TYPE *weight, TYPE *y, long rows, long width,       \
                         float eps, float offset, int threads) {                                 \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")       \
        for (long row = 0; row < rows; row++) {                                                  \
            const TYPE *from = x + row * width;                                                  \
            TYPE *to = y + row * width;                                                          \
            float scale = 1.0f / sqrtf(squares_##NAME(from, width) / width + eps);               \
            for (long at = 0; at < width; at++) {                                                \
                float normed = read_##NAME(from[at]) * scale;                                    \
                if (offset == 0) normed = read_##NAME(round_##NAME(normed));                     \
                to[at] = round_##NAME(normed * (read_##NAME(weight[at]) + offset));              \
            }                                                                                    \
        }                                                                                        \
    }

/* Turns the halves of each head against each other; tokens lie `stride` values apart. */
#define ROTATE(NAME, TYPE)                                                                       \
    void rotate_##NAME(const TYPE *x, const TYPE *cosine, const TYPE *sine, TYPE *y, long tokens, \
                       long stride, long heads, long width, int threads) {                       \
        long half = width / 2;                                                                   \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")       \
        for (long token = 0; token < tokens; token++)                                            \
            for (long head = 0; head < heads; head++) {                                          \
                const TYPE *from = x + token * stride + head * width;                            \
                const TYPE *along = cosine + token * width, *across = sine + token * width;      \
                TYPE *restrict to = y + (token * heads + head) * width;                          \
                for (long at = 0; at < half; at++) {                                             \
                    float first = read_##NAME(from[at]), second = read_##NAME(from[at + half]);  \
                    to[at] = round_##NAME(first * read_##NAME(along[at]) -                       \
                                          second * read_##NAME(across[at]));                     \
                    to[at + half] = round_##NAME(second * read_##NAME(along[at + half]) +        \
                                                 first * read_##NAME(across[at + half]));        \
                }                                                                                \
            }                                                                                    \
    }

/* Softmax(scale q k^T) v of one query for each head over all keys, heads in groups. */
#define ATTEND(NAME, TYPE)                                                                       \
    void attend_##NAME(const TYPE *q, const TYPE *k, const TYPE *v, TYPE *out, long keys,         \
                       long heads, long kv_heads, long width, float scale, int threads) {        \
        long stride = kv_heads * width, padding = padded(width);                                 \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")       \
        for (long head = 0; head < heads; head++) {                                              \
            long start = head / (heads / kv_heads) * width;                                      \
            float *sums = malloc((2 * padding + keys) * sizeof(float));                          \
            operand_##NAME *query = (operand_##NAME *)(sums + padding);                          \
            float *scores = sums + 2 * padding;                                                  \
            operand_##NAME##_from(q + head * width, query, width, padding);                      \
            for (long at = 0; at < width; at++) sums[at] = 0;                                    \
            float highest = -INFINITY, weights = 0;                                              \
            for (long key = 0, count; key < keys; key += count) {                                \
                const TYPE *from = k + key * stride + start;                                     \
                count = key + 8 <= keys ? 8 : 1;                                                 \
                if (count == 8) dots_##NAME(from, stride, query, 0, width, 1, 8, scores + key);  \
                else dots_##NAME(from, stride, query, 0, width, 1, 1, scores + key);             \
            }                                                                                    \
            for (long key = 0; key < keys; key++) {                                              \
                scores[key] *= scale;                                                            \
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
            free(sums);                                                                          \
        }                                                                                        \
    }

/* act(gate) * up, the gate being the first half of each row. */
#define GATE(NAME, TYPE, ACT)                                                                    \
    void gate_##ACT##_##NAME(const TYPE *x, TYPE *y, long rows, long width, int threads) {       \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")       \
        for (long row = 0; row < rows; row++)                                                    \
            for (long at = 0; at < width; at++) {                                                \
                float gate = ACT(read_##NAME(x[row * 2 * width + at]));                          \
                float up = read_##NAME(x[(row * 2 + 1) * width + at]);                           \
                y[row * width + at] = round_##NAME(read_##NAME(round_##NAME(gate)) * up);        \
            }                                                                                    \
    }

/* act(gate) * up with act(x) = x / (1 + e^-x), a vector at a time. */
#define GATE_SILU(NAME, TYPE, PLACE)                                                            \
    void gate_silu_##NAME(const TYPE *x, TYPE *y, long rows, long width, int threads) {          \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")       \
        for (long row = 0; row < rows; row++) {                                                  \
            const TYPE *gates = x + row * 2 * width, *ups = gates + width;                       \
            TYPE *to = y + row * width;                                                          \
            for (long at = 0; at < width; at += STEP) {                                          \
                long count = width - at < STEP ? width - at : STEP;                              \
                TYPE gate[STEP] = {0}, up[STEP] = {0};                                           \
                memcpy(gate, gates + at, count * sizeof(TYPE));                                  \
                memcpy(up, ups + at, count * sizeof(TYPE));                                      \
                vec g[2], u[2];                                                                  \
                halves_##NAME(gate, g, g + 1), halves_##NAME(up, u, u + 1);                      \
                float activated[STEP], found[STEP];                                              \
                for (int half = 0; half < 2; half++) {                                           \
                    vec size = (vec)((words)g[half] & 0x7fffffffu);                              \
                    vec power = exponential(-size), whole = 1.0f / (1.0f + power);               \
                    words is_negative = (words)(g[half] < 0.0f);                                 \
                    vec share = (vec)((is_negative & (words)(power * whole)) |                   \
                                      (~is_negative & (words)whole));                            \
                    share *= g[half];                                                            \
                    memcpy(activated + half * LANES, &share, sizeof share);                      \
                    memcpy(found + half * LANES, u + half, sizeof share);                        \
                }                                                                                \
                TYPE result[STEP];                                                               \
                for (int place = 0; place < STEP; place++) {                                     \
                    float rounded = read_##NAME(round_##NAME(activated[PLACE(place)]));          \
                    result[place] = round_##NAME(rounded * found[PLACE(place)]);                 \
                }                                                                                \
                memcpy(to + at, result, count * sizeof(TYPE));                                   \
            }                                                                                    \
        }                                                                                        \
    }

#define ALL(NAME, TYPE, PLACE)                                                                  \
    RMS_NORM(NAME, TYPE)                                                                         \
    ROTATE(NAME, TYPE)                                                                           \
    ATTEND(NAME, TYPE)                                                                           \
    GATE_SILU(NAME, TYPE, PLACE)                                                                 \
    GATE(NAME, TYPE, gelu_tanh)

ALL(f32, float, PLAIN)
ALL(bf16, uint16_t, PAIRED)
