/* y = x W^T + b for few rows or many, W as it lies.
 *
 * Tiles of up to four rows by a few columns are held in registers. A group of columns stays in the
 * second-level cache while all rows go by, so that each weight is read from memory once.
 */
#include "vectors.h"

#define GROUP 24 /* columns; a multiple of every tile's */

/* How many columns go with so many rows: as many sums as there are registers for. */
#define COLUMNS(rows) ((rows) == 1 ? 8 : (rows) == 2 ? 6 * LANES / 8 : 12 * LANES / 8 / (rows))

#define TILES(NAME, TYPE, OPERAND, X)                                                           \
    INLINE void columns_##NAME(const TYPE *weight, const float *scale, const void *bias,          \
                               const OPERAND *x, X *y, long width, long step, long outputs,      \
                               long first, long last, const int rows) {                          \
        const X *added = bias;                                                                   \
        const int columns = COLUMNS(rows) > GROUP ? GROUP : COLUMNS(rows);                       \
        float sums[4 * 24];                                                                      \
        for (long column = first, count; column < last; column += count) {                       \
            count = column + columns <= last ? columns : 1;                                      \
            const TYPE *from = weight + column * width;                                          \
            if (count == columns)                                                                \
                DOTS_##NAME(from, width, x, step, width, rows, columns, sums);                   \
            else                                                                                 \
                DOTS_##NAME(from, width, x, step, width, rows, 1, sums);                         \
            for (int row = 0; row < rows; row++)                                                 \
                for (long at = 0; at < count; at++) {                                            \
                    float sum = sums[row * count + at];                                          \
                    if (scale) sum *= scale[column + at];                                        \
                    if (added) sum += READ_##NAME(added[column + at]);                           \
                    y[row * outputs + column + at] = ROUND_##NAME(sum);                          \
                }                                                                                \
        }                                                                                        \
    }

#define PRODUCT(NAME, TYPE, OPERAND, X)                                                         \
    TILES(NAME, TYPE, OPERAND, X)                                                                \
    static void group_##NAME(const TYPE *weight, const float *scale, const void *bias,            \
                             const OPERAND *x, X *y, long rows, long width, long step,           \
                             long outputs, long first, long last) {                              \
        for (long row = 0, count; row < rows; row += count) {                                    \
            long tiles = (rows - row + 3) / 4;                                                   \
            count = (rows - row + tiles - 1) / tiles;                                            \
            const OPERAND *at = x + row * step;                                                  \
            X *to = y + row * outputs;                                                           \
            if (count == 4)                                                                      \
                columns_##NAME(weight, scale, bias, at, to, width, step, outputs, first, last, 4); \
            else if (count == 3)                                                                 \
                columns_##NAME(weight, scale, bias, at, to, width, step, outputs, first, last, 3); \
            else if (count == 2)                                                                 \
                columns_##NAME(weight, scale, bias, at, to, width, step, outputs, first, last, 2); \
            else                                                                                 \
                columns_##NAME(weight, scale, bias, at, to, width, step, outputs, first, last, 1); \
        }                                                                                        \
    }                                                                                            \
    void product_##NAME(const TYPE *weight, const float *scale, const X *bias, const X *x, X *y,  \
                        long rows, long width, long outputs, int threads) {                      \
        long step = padded(width);                                                               \
        OPERAND *wide = aligned_alloc(64, (rows * step * sizeof(OPERAND) + 63) / 64 * 64);       \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                          \
            _Pragma("omp for schedule(static)")                                                  \
            for (long row = 0; row < rows; row++)                                                \
                FROM_##NAME(x + row * width, wide + row * step, width, step);                    \
            _Pragma("omp for schedule(static)")                                                  \
            for (long group = 0; group < (outputs + GROUP - 1) / GROUP; group++) {               \
                long first = group * GROUP;                                                      \
                long last = first + GROUP < outputs ? first + GROUP : outputs;                   \
                group_##NAME(weight, scale, bias, wide, y, rows, width, step, outputs, first,     \
                             last);                                                              \
            }                                                                                    \
        }                                                                                        \
        free(wide);                                                                              \
    }

#define DOTS_f32 dots_f32
#define READ_f32 read_f32
#define ROUND_f32 round_f32
#define FROM_f32 operand_f32_from
PRODUCT(f32, float, float, float)

#define DOTS_bf16 dots_bf16
#define READ_bf16 read_bf16
#define ROUND_bf16 round_bf16
#define FROM_bf16 operand_bf16_from
PRODUCT(bf16, uint16_t, operand_bf16, uint16_t)

/* Weights in int8, one scale for each column. */
#define DOTS_i8_f32 dots_i8
#define READ_i8_f32 read_f32
#define ROUND_i8_f32 round_f32
#define FROM_i8_f32 spread_f32
PRODUCT(i8_f32, int8_t, float, float)

#define DOTS_i8_bf16 dots_i8
#define READ_i8_bf16 read_bf16
#define ROUND_i8_bf16 round_bf16
#define FROM_i8_bf16 spread_bf16_plainly
PRODUCT(i8_bf16, int8_t, float, uint16_t)
