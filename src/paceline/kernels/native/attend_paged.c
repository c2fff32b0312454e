/* Keys and values into blocks, and attention over them, of all sequences of a step in one call.
 *
 * Keys are taken in splits of fixed places. A query's softmax is that of its splits, folded one
 * after the other, so that it is the same whatever else is in the step and however it is cut.
 */
#include "vectors.h"

#define SPLIT 256  /* keys; a multiple of every block's tokens */
#define CHUNK 16   /* queries of one sequence that are computed together */

typedef struct {
    const int32_t *tables, *starts, *before;
    long table_width, sequences, heads, kv_heads, block_size, width;
    long q_stride, k_stride, v_stride, window;
    float scale;
} Step;

/* One piece of work: some queries of a sequence over some splits, for one key head. */
typedef struct {
    long sequence, kv_head, first, last, first_split, last_split;
} Piece;

typedef struct {
    float highest, weight;
} Softmax;

/* Folds one split into what came before it. */
static __attribute__((noinline)) void fold(Softmax *all, float *sums, const Softmax *part,
                                           const float *more, long width) {
    if (part->highest == -INFINITY) return;
    float highest = part->highest > all->highest ? part->highest : all->highest;
    float old = all->highest == -INFINITY ? 0.0f : expf(all->highest - highest);
    float new = expf(part->highest - highest);
    all->highest = highest;
    all->weight = all->weight * old + part->weight * new;
    for (long at = 0; at < width; at++) sums[at] = sums[at] * old + more[at] * new;
}

/* Scores become weights, in place; keys outside [first, last) weigh nothing. */
static __attribute__((noinline)) Softmax soften(float *scores, long first, long last, float scale) {
    Softmax found = {-INFINITY, 0.0f};
    if (first >= last) return found;
    long begin = first / LANES * LANES, end = (last + LANES - 1) / LANES * LANES;
    for (long at = begin; at < first; at++) scores[at] = -INFINITY;
    for (long at = last; at < end; at++) scores[at] = -INFINITY;
    for (long at = first; at < last; at++) {
        scores[at] *= scale;
        if (scores[at] > found.highest) found.highest = scores[at];
    }
    vec sums = {0};
    for (long at = begin; at < end; at += LANES) {
        vec weights = exponential(load(scores + at) - found.highest);
        memcpy(scores + at, &weights, sizeof weights);
        sums += weights;
    }
    found.weight = total(sums);
    return found;
}

INLINE long highest_of(long left, long right) { return left > right ? left : right; }
INLINE long lowest_of(long left, long right) { return left < right ? left : right; }

/* The first key that a query at a place sees. */
INLINE long seen_from(const Step *step, long place) {
    return step->window ? highest_of(0, place + 1 - step->window) : 0;
}

#define PAGED(NAME, TYPE)                                                                       \
    static void keep_##NAME(const Step *step, long sequence, long token, const TYPE *k,           \
                            const TYPE *v, TYPE *k_blocks, TYPE *v_blocks) {                     \
        long place = step->before[sequence] + token - step->starts[sequence];                    \
        long block = step->tables[sequence * step->table_width + place / step->block_size];      \
        for (long head = 0; head < step->kv_heads; head++) {                                     \
            long to = ((block * step->kv_heads + head) * step->block_size +                      \
                       place % step->block_size) * step->width;                                  \
            long from = head * step->width;                                                      \
            memcpy(k_blocks + to, k + token * step->k_stride + from, step->width * sizeof(TYPE)); \
            memcpy(v_blocks + to, v + token * step->v_stride + from, step->width * sizeof(TYPE)); \
        }                                                                                        \
    }                                                                                            \
                                                                                                 \
    /* Products of a few queries with the keys of one block. */                                  \
    INLINE void score_##NAME(const TYPE *keys, const operand_##NAME *q, float *scores, long count, \
                             long width, long operand_width, const int rows) {                   \
        const int columns = rows == 4 ? 3 * LANES / 8 : 4;                                       \
        float found[32];                                                                         \
        for (long key = 0, done; key < count; key += done) {                                     \
            done = key + columns <= count ? columns : 1;                                         \
            if (done == columns)                                                                 \
                dots_##NAME(keys + key * width, width, q, operand_width, width, rows, columns,   \
                            found);                                                              \
            else                                                                                 \
                dots_##NAME(keys + key * width, width, q, operand_width, width, rows, 1, found);  \
            for (int row = 0; row < rows; row++)                                                 \
                for (long at = 0; at < done; at++)                                               \
                    scores[row * SPLIT + key + at] = found[row * done + at];                     \
        }                                                                                        \
    }                                                                                            \
                                                                                                 \
    /* Sums of values by weight, `parts` steps of the width at a time. */                        \
    INLINE void gather_##NAME(const TYPE *values, long block_stride, const int32_t *table,        \
                              const float *weights, long first, long last, long block_size,      \
                              long width, long rest, float *out, long out_stride,                \
                              const int rows, const int parts) {                                 \
        vec sums[24];                                                                            \
        _Pragma("GCC unroll 24") for (int at = 0; at < rows * parts * 2; at++) sums[at] = (vec){0}; \
        for (long key = first; key < last;) {                                                    \
            const TYPE *value = values + table[key / block_size] * block_stride +                \
                                key % block_size * width;                                        \
            long end = lowest_of(last, (key / block_size + 1) * block_size);                     \
            for (; key < end; key++, value += width) {                                           \
                _Pragma("GCC unroll 2") for (int part = 0; part < parts; part++) {               \
                    vec low, high;                                                               \
                    if (rest) {                                                                  \
                        TYPE tail[STEP] = {0};                                                   \
                        memcpy(tail, value, rest * sizeof(TYPE));                                \
                        halves_##NAME(tail, &low, &high);                                        \
                    } else                                                                       \
                        halves_##NAME(value + part * STEP, &low, &high);                         \
                    _Pragma("GCC unroll 4") for (int row = 0; row < rows; row++) {               \
                        vec weight = all_lanes(weights[row * SPLIT + key]);                      \
                        vec *mine = sums + (row * parts + part) * 2;                             \
                        mine[0] = multiplied(mine[0], low, weight);                              \
                        mine[1] = multiplied(mine[1], high, weight);                             \
                    }                                                                            \
                }                                                                                \
            }                                                                                    \
        }                                                                                        \
        _Pragma("GCC unroll 4") for (int row = 0; row < rows; row++)                             \
            memcpy(out + row * out_stride, sums + row * parts * 2, parts * STEP * sizeof(float)); \
    }                                                                                            \
                                                                                                 \
    /* One split for a few queries: `rows` of one key head, the first at `place_of(0)`. */       \
    INLINE void split_##NAME(const Step *step, const Piece *piece, long split, long row,          \
                             const operand_##NAME *q, const TYPE *k_blocks, const TYPE *v_blocks, \
                             float *scores, float *part, Softmax *all, float *sums,              \
                             const int rows) {                                                   \
        long group = step->heads / step->kv_heads, width = step->width, padding = padded(width);  \
        long size = step->block_size, block_stride = step->kv_heads * size * width;              \
        const int32_t *table = step->tables + piece->sequence * step->table_width;               \
        const TYPE *keys = k_blocks + piece->kv_head * size * width;                             \
        const TYPE *values = v_blocks + piece->kv_head * size * width;                           \
        long base = step->before[piece->sequence] + piece->first - step->starts[piece->sequence]; \
        long begin = split * SPLIT, last_place = base + (row + rows - 1) / group;                \
        long first = highest_of(begin, seen_from(step, base + row / group));                     \
        long last = lowest_of(begin + SPLIT, last_place + 1);                                    \
        if (first >= last) return;                                                               \
        for (long block = first / size; block * size < last; block++)                            \
            score_##NAME(keys + table[block] * block_stride, q, scores + block * size - begin,    \
                         lowest_of(size, last - block * size), width, padding, rows);            \
        Softmax found[4];                                                                        \
        for (int at = 0; at < rows; at++) {                                                      \
            long place = base + (row + at) / group;                                              \
            long from = highest_of(begin, seen_from(step, place));                               \
            long to = highest_of(from, lowest_of(begin + SPLIT, place + 1));                     \
            float *mine = scores + at * SPLIT;                                                   \
            found[at] = soften(mine, from - begin, to - begin, step->scale);                     \
            for (long key = first; key < from; key++) mine[key - begin] = 0.0f;                  \
            for (long key = to; key < last; key++) mine[key - begin] = 0.0f;                     \
        }                                                                                        \
        const float *weights = scores - begin;                                                   \
        long at = 0;                                                                             \
        if (rows < 4)                                                                            \
            for (; at + 2 * STEP <= width; at += 2 * STEP)                                       \
                gather_##NAME(values + at, block_stride, table, weights, first, last, size,      \
                              width, 0, part + at, padding, rows, 2);                            \
        for (; at + STEP <= width; at += STEP)                                                   \
            gather_##NAME(values + at, block_stride, table, weights, first, last, size, width, 0, \
                          part + at, padding, rows, 1);                                          \
        if (at < width)                                                                          \
            gather_##NAME(values + at, block_stride, table, weights, first, last, size, width,   \
                          width - at, part + at, padding, rows, 1);                              \
        for (int at = 0; at < rows; at++)                                                        \
            fold(all + at, sums + at * padding, found + at, part + at * padding, padding);       \
    }                                                                                            \
                                                                                                 \
    /* Folds a piece's splits into `all` and `sums`, a row for each of its queries and heads. */  \
    static void piece_##NAME(const Step *step, const Piece *piece, const TYPE *q,                 \
                             const TYPE *k_blocks, const TYPE *v_blocks, char *scratch,          \
                             Softmax *all, float *sums) {                                        \
        long group = step->heads / step->kv_heads, padding = padded(step->width);                \
        long rows = (piece->last - piece->first) * group;                                        \
        float *scores = (float *)scratch, *part = scores + 4 * SPLIT;                            \
        operand_##NAME *wide = (operand_##NAME *)(part + 4 * padding);                           \
        for (long row = 0; row < rows; row++) {                                                  \
            long head = piece->kv_head * group + row % group;                                    \
            operand_##NAME##_from(                                                               \
                q + (piece->first + row / group) * step->q_stride + head * step->width,          \
                wide + row * padding, step->width, padding);                                     \
            all[row] = (Softmax){-INFINITY, 0.0f};                                               \
            memset(sums + row * padding, 0, padding * sizeof(float));                            \
        }                                                                                        \
        for (long split = piece->first_split; split < piece->last_split; split++)                \
            for (long row = 0, count; row < rows; row += count) {                                \
                count = lowest_of(rows - row, rows % 4 && rows % 3 == 0 ? 3 : 4);                \
                if (count == 4)                                                                  \
                    split_##NAME(step, piece, split, row, wide + row * padding, k_blocks,        \
                                 v_blocks, scores, part, all + row, sums + row * padding, 4);    \
                else if (count == 3)                                                             \
                    split_##NAME(step, piece, split, row, wide + row * padding, k_blocks,        \
                                 v_blocks, scores, part, all + row, sums + row * padding, 3);    \
                else if (count == 2)                                                             \
                    split_##NAME(step, piece, split, row, wide + row * padding, k_blocks,        \
                                 v_blocks, scores, part, all + row, sums + row * padding, 2);    \
                else                                                                             \
                    split_##NAME(step, piece, split, row, wide + row * padding, k_blocks,        \
                                 v_blocks, scores, part, all + row, sums + row * padding, 1);    \
            }                                                                                    \
    }                                                                                            \
                                                                                                 \
    static void finish_##NAME(const Softmax *all, const float *sums, TYPE *out, long width) {     \
        for (long at = 0; at < width; at++)                                                      \
            out[at] = round_##NAME(sums[PLACE_##NAME(at)] / all->weight);                        \
    }                                                                                            \
                                                                                                 \
    void attend_paged_##NAME(const TYPE *q, const TYPE *k, const TYPE *v, TYPE *out,              \
                             TYPE *k_blocks, TYPE *v_blocks, const int32_t *tables,              \
                             const int32_t *starts, const int32_t *before, long table_width,     \
                             long sequences, long heads, long kv_heads, long block_size,         \
                             long width, long q_stride, long k_stride, long v_stride,            \
                             long window, float scale, int threads) {                            \
        Step step = {tables, starts, before, table_width, sequences, heads, kv_heads, block_size, \
                     width, q_stride, k_stride, v_stride, window, scale};                        \
        long group = heads / kv_heads, padding = padded(width), num_pieces = 0;                  \
        Piece *pieces = pieces_of(&step, threads, &num_pieces);                                  \
        long most = CHUNK * group;                                                               \
        long state = most * (padding * sizeof(float) + sizeof(Softmax));                         \
        long scratch = (4 * SPLIT + 4 * padding + most * padding) * sizeof(float);               \
        char *states = NULL;                                                                     \
        long apart = first_apart(pieces, num_pieces);                                            \
        if (apart < num_pieces) states = malloc((num_pieces - apart) * state);                   \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                          \
            char *mine = aligned_alloc(64, (scratch + state + 63) / 64 * 64);                    \
            _Pragma("omp for schedule(static)")                                                  \
            for (long sequence = 0; sequence < sequences; sequence++)                            \
                for (long token = starts[sequence]; token < starts[sequence + 1]; token++)       \
                    keep_##NAME(&step, sequence, token, k, v, k_blocks, v_blocks);               \
            _Pragma("omp for schedule(dynamic)")                                                 \
            for (long at = 0; at < num_pieces; at++) {                                           \
                const Piece *piece = pieces + at;                                                \
                char *held = at < apart ? mine + scratch : states + (at - apart) * state;        \
                float *sums = (float *)held;                                                     \
                Softmax *all = (Softmax *)(sums + most * padding);                               \
                piece_##NAME(&step, piece, q, k_blocks, v_blocks, mine, all, sums);              \
                if (at < apart)                                                                  \
                    for (long row = 0; row < (piece->last - piece->first) * group; row++)        \
                        finish_##NAME(all + row, sums + row * padding,                           \
                                      out + ((piece->first + row / group) * heads +              \
                                             piece->kv_head * group + row % group) * width,      \
                                      width);                                                    \
            }                                                                                    \
            free(mine);                                                                          \
        }                                                                                        \
        /* Splits of one query that were computed apart, folded in their order. */               \
        for (long at = apart, count; at < num_pieces; at += count) {                             \
            const Piece *piece = pieces + at;                                                    \
            float *sums = (float *)(states + (at - apart) * state);                              \
            Softmax *all = (Softmax *)(sums + most * padding);                                   \
            for (count = 1; at + count < num_pieces && piece[count].first_split; count++) {      \
                float *more = (float *)(states + (at + count - apart) * state);                  \
                Softmax *part = (Softmax *)(more + most * padding);                              \
                for (long row = 0; row < (piece->last - piece->first) * group; row++)            \
                    fold(all + row, sums + row * padding, part + row, more + row * padding,      \
                         padding);                                                               \
            }                                                                                    \
            for (long row = 0; row < (piece->last - piece->first) * group; row++)                \
                finish_##NAME(all + row, sums + row * padding,                                   \
                              out + ((piece->first + row / group) * heads +                      \
                                     piece->kv_head * group + row % group) * width,              \
                              width);                                                            \
        }                                                                                        \
        free(states);                                                                            \
        free(pieces);                                                                            \
    }

#define PLACE_f32(at) PLAIN(at)
#define PLACE_bf16(at) PAIRED(at)

static long pieces_over(const Step *step, long sequence, long apart, Piece *to);

/* All pieces of a step: whole queries first, then those whose splits are computed apart. */
static Piece *pieces_of(const Step *step, int threads, long *count) {
    long most = 0;
    for (long sequence = 0; sequence < step->sequences; sequence++)
        most += pieces_over(step, sequence, threads > 1, NULL);
    Piece *pieces = malloc((most + 1) * sizeof(Piece));
    *count = 0;
    for (int apart = 0; apart < 2; apart++)
        for (long sequence = 0; sequence < step->sequences; sequence++) {
            long queries = step->starts[sequence + 1] - step->starts[sequence];
            long splits = (step->before[sequence] + queries + SPLIT - 1) / SPLIT;
            int is_apart = threads > 1 && queries == 1 && splits > 1;
            if (is_apart == apart)
                *count += pieces_over(step, sequence, apart, pieces + *count);
        }
    return pieces;
}

static long pieces_over(const Step *step, long sequence, long apart, Piece *to) {
    long begin = step->starts[sequence], end = step->starts[sequence + 1], count = 0;
    for (long head = 0; head < step->kv_heads; head++)
        for (long first = begin; first < end; first += CHUNK) {
            long last = lowest_of(end, first + CHUNK);
            long place = step->before[sequence] + first - begin;
            long splits = (place + last - first + SPLIT - 1) / SPLIT;
            long each = apart && end - begin == 1 ? 1 : splits;
            for (long split = 0; split < splits; split += each, count++)
                if (to) to[count] = (Piece){sequence, head, first, last, split, split + each};
        }
    return count;
}

static long first_apart(const Piece *pieces, long count) {
    for (long at = 0; at < count; at++)
        if (pieces[at].last_split - pieces[at].first_split == 1 && at + 1 < count &&
            pieces[at + 1].first_split > 0)
            return at;
    return count;
}

PAGED(f32, float)
PAGED(bf16, uint16_t)
