/* Vectors that every kernel is written in: the compiler's own (GCC and Clang), so that the source
 * is the same for every CPU. bfloat16 is the upper half of a float32; sums are in float32.
 *
 * Widths are walked in steps of two vectors. A step of bfloat16 is read as one vector of pairs,
 * whose lower halves are the even values and whose upper halves are the odd ones; what it is
 * multiplied with is laid out likewise beforehand (`spread`), once for all weights.
 */
#ifndef PACELINE_VECTORS_H
#define PACELINE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __FMA__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define STEP (2 * LANES)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

/* sums + left * right, rounded once. It is said which sums are so: a compiler that may choose chooses
 * one way in one tile and another way in the next, and the bits differ.
 */
INLINE vec multiplied(vec sums, vec left, vec right) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)left, (__m512)right, (__m512)sums);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)left, (__m256)right, (__m256)sums);
#elif defined(__FP_FAST_FMAF)
    for (int lane = 0; lane < LANES; lane++)
        sums[lane] = __builtin_fmaf(left[lane], right[lane], sums[lane]);
    return sums;
#else
    return sums + left * right;
#endif
}

INLINE vec all_lanes(float value) { return (vec){0} + value; }

INLINE float read_f32(float value) { return value; }

INLINE float read_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

INLINE float round_f32(float value) { return value; }

/* To the nearest, ties to even, as torch rounds. */
INLINE uint16_t round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE vec load(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* A step of values as two vectors. */
INLINE void halves_f32(const float *from, vec *first, vec *second) {
    *first = load(from), *second = load(from + LANES);
}

INLINE void halves_bf16(const uint16_t *from, vec *first, vec *second) {
    words pairs;
    memcpy(&pairs, from, sizeof pairs);
    *first = (vec)(pairs << 16), *second = (vec)(pairs & 0xffff0000u);
}

INLINE void halves_i8(const int8_t *from, vec *first, vec *second) {
    bytes low, high;
    memcpy(&low, from, sizeof low), memcpy(&high, from + LANES, sizeof high);
    *first = __builtin_convertvector(low, vec), *second = __builtin_convertvector(high, vec);
}

/* Where a value of a step stands in the two vectors, and the values of a width laid out so. */
#define PLAIN(at) (at)
#define PAIRED(at) ((at) / STEP * STEP + (at) % 2 * LANES + (at) % STEP / 2)
#define SPREAD(NAME, TYPE, READ, PLACE)                                                         \
    INLINE void spread_##NAME(const TYPE *from, float *to, long width, long padded) {            \
        if (padded != width) memset(to + padded - STEP, 0, STEP * sizeof(float));               \
        for (long at = 0; at < width; at++) to[PLACE(at)] = READ(from[at]);                      \
    }
SPREAD(f32, float, read_f32, PLAIN)
SPREAD(bf16, uint16_t, read_bf16, PAIRED)
SPREAD(bf16_plainly, uint16_t, read_bf16, PLAIN)

INLINE long padded(long width) { return (width + STEP - 1) / STEP * STEP; }

/* What a step of a weight is multiplied from, a part at a time: its halves in float32, or all of it
 * where the machine multiplies pairs of bfloat16 itself. The other operand is laid out to fit.
 */
INLINE vec part_f32(const float *from, int half) { return load(from + half * LANES); }

INLINE vec part_i8(const int8_t *from, int half) {
    bytes values;
    memcpy(&values, from + half * LANES, sizeof values);
    return __builtin_convertvector(values, vec);
}

typedef float operand_f32;
typedef vec lanes_f32, lanes_i8;
#define operand_f32_from spread_f32
#define PARTS_f32 2
#define PARTS_i8 2
#define multiplied_f32 multiplied
#define multiplied_i8 multiplied
#define operand_f32_at load
#define operand_i8_at load

#ifdef __AVX512BF16__
typedef uint16_t operand_bf16;
typedef __m512i lanes_bf16;
#define PARTS_bf16 1
INLINE __m512i part_bf16(const uint16_t *from, int half) {
    return _mm512_loadu_si512(from + half);
}
INLINE __m512i operand_bf16_at(const uint16_t *from) { return _mm512_loadu_si512(from); }
INLINE vec multiplied_bf16(vec sums, __m512i left, __m512i right) {
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
}
INLINE void operand_bf16_from(const uint16_t *from, uint16_t *to, long width, long padded) {
    if (padded != width) memset(to + padded - STEP, 0, STEP * sizeof(uint16_t));
    memcpy(to, from, width * sizeof(uint16_t));
}
#else
typedef float operand_bf16;
typedef vec lanes_bf16;
#define PARTS_bf16 2
INLINE vec part_bf16(const uint16_t *from, int half) {
    words pairs;
    memcpy(&pairs, from, sizeof pairs);
    return (vec)(half ? pairs & 0xffff0000u : pairs << 16);
}
#define operand_bf16_at load
#define operand_bf16_from spread_bf16
#define multiplied_bf16 multiplied
#endif

/* The sum of all lanes, in one order. */
INLINE float total(vec value) {
    typedef float quarter __attribute__((vector_size(16)));
    quarter parts[LANES / 4];
    memcpy(parts, &value, sizeof value);
    for (int part = 1; part < LANES / 4; part++) parts[0] += parts[part];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

/* e^x for x <= 0, within 2e-7 of it; 0 from -87 down (Cephes's polynomial). */
INLINE vec exponential(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    words is_zero = (words)(x < -87.0f);
    x = (vec)((words)x & ~is_zero);
    vec shifted = multiplied(all_lanes(magic), x, all_lanes(1.44269504088896341f));
    vec whole = shifted - magic;
    vec rest = multiplied(x, whole, all_lanes(-0.693359375f));
    rest = multiplied(rest, whole, all_lanes(2.12194440e-4f));
    vec series = multiplied(all_lanes(1.3981999507e-3f), rest, all_lanes(1.9875691500e-4f));
    series = multiplied(all_lanes(8.3334519073e-3f), series, rest);
    series = multiplied(all_lanes(4.1665795894e-2f), series, rest);
    series = multiplied(all_lanes(1.6666665459e-1f), series, rest);
    series = multiplied(all_lanes(5.0000001201e-1f), series, rest);
    series = multiplied(rest + 1.0f, series, rest * rest);
    words power = ((words)shifted - (words)all_lanes(magic)) << 23;
    return (vec)(((words)series + power) & ~is_zero);
}

/* ROWS x COLUMNS dot products, of steps and a rest. Each is summed in the same order, whatever the
 * tile: lane by lane along the width, then the lanes. Weights of a part are held in registers while
 * each row's operand goes by.
 */
#define DOTS(NAME, TYPE, OPERAND)                                                               \
    INLINE void step_##NAME(vec *sums, const TYPE *weight, long stride, const OPERAND *x,         \
                            long x_stride, const int rows, const int columns) {                  \
        _Pragma("GCC unroll 2") for (int part = 0; part < PARTS_##NAME; part++) {                \
            lanes_##NAME weights[24];                                                            \
            _Pragma("GCC unroll 24") for (int column = 0; column < columns; column++)            \
                weights[column] = part_##NAME(weight + column * stride, part);                   \
            _Pragma("GCC unroll 4") for (int row = 0; row < rows; row++) {                       \
                lanes_##NAME value = operand_##NAME##_at(x + row * x_stride + part * LANES);     \
                _Pragma("GCC unroll 24") for (int column = 0; column < columns; column++)        \
                    sums[row * columns + column] = multiplied_##NAME(                            \
                        sums[row * columns + column], weights[column], value);                   \
            }                                                                                    \
        }                                                                                        \
    }                                                                                            \
    static __attribute__((noinline)) void rest_##NAME(vec *sums, const TYPE *weight, long stride, \
                                                      const OPERAND *x, long x_stride,           \
                                                      long count, int rows, int columns) {       \
        for (int column = 0; column < columns; column++) {                                       \
            TYPE rest[STEP] = {0};                                                               \
            memcpy(rest, weight + column * stride, count * sizeof(TYPE));                        \
            for (int row = 0; row < rows; row++)                                                 \
                step_##NAME(sums + row * columns + column, rest, 0, x + row * x_stride, 0, 1, 1); \
        }                                                                                        \
    }                                                                                            \
    INLINE void dots_##NAME(const TYPE *weight, long stride, const OPERAND *x, long x_stride,     \
                            long width, const int rows, const int columns, float *out) {         \
        vec sums[24];                                                                            \
        _Pragma("GCC unroll 24") for (int at = 0; at < rows * columns; at++) sums[at] = (vec){0}; \
        long steps = width / STEP * STEP;                                                        \
        for (long at = 0; at < steps; at += STEP)                                                \
            step_##NAME(sums, weight + at, stride, x + at, x_stride, rows, columns);             \
        if (steps < width) {                                                                     \
            vec held[24];                                                                        \
            memcpy(held, sums, rows * columns * sizeof(vec));                                    \
            rest_##NAME(held, weight + steps, stride, x + steps, x_stride, width - steps, rows,   \
                        columns);                                                                \
            memcpy(sums, held, rows * columns * sizeof(vec));                                    \
        }                                                                                        \
        _Pragma("GCC unroll 24") for (int at = 0; at < rows * columns; at++)                      \
            out[at] = total(sums[at]);                                                           \
    }
DOTS(f32, float, float)
DOTS(bf16, uint16_t, operand_bf16)
DOTS(i8, int8_t, float)

#endif
