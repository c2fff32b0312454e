/* A token for each row of logits: the highest, or one drawn as `paceline.decode.sampler` draws. */
#include "vectors.h"

/* Below this share of its size a winner's lead could be rounding: scores and noise are within 1e-12
 * of exact.
 */
#define MARGIN 1e-9

/* Philox4x64-10 (Salmon et al., SC 2011, Sec. 3), as numpy's: four words for each counter. */
static void philox(const uint64_t *key, uint64_t block, uint64_t position, uint64_t *words) {
    uint64_t counter[4] = {block, position, 0, 0}, first = key[0], second = key[1];
    for (int round = 0; round < 10; round++) {
        unsigned __int128 left = (unsigned __int128)counter[0] * 0xD2E7470EE14C6C93u;
        unsigned __int128 right = (unsigned __int128)counter[2] * 0xCA5A826395121157u;
        counter[0] = (uint64_t)(right >> 64) ^ counter[1] ^ first;
        counter[2] = (uint64_t)(left >> 64) ^ counter[3] ^ second;
        counter[1] = (uint64_t)right, counter[3] = (uint64_t)left;
        first += 0x9E3779B97F4A7C15u, second += 0xBB67AE8584CAA73Bu;
    }
    memcpy(words, counter, sizeof counter);
}

static double uniform(uint64_t word) { return ((double)(word >> 12) + 0.5) * 0x1p-52; }

/* No less than the noise of a uniform draw u: -log(-log u) <= -log(1 - u) <= -log2(1 - u) rounded
 * up, times log 2. 1 - u is exact.
 */
static double bound(double draw) {
    double rest = 1.0 - draw;
    uint64_t bits;
    memcpy(&bits, &rest, 8);
    return (1023 - (double)(bits >> 52)) * 0.6931471805599454;
}

typedef struct {
    double best, next, limit; /* what cannot reach the limit cannot matter */
    long place;
} Leader;

static void consider(Leader *leader, double score, long place) {
    if (score > leader->best) {
        leader->next = leader->best, leader->best = score, leader->place = place;
        leader->limit = score - 2 * MARGIN * (1.0 + fabs(score));
    } else if (score > leader->next)
        leader->next = score;
}

#define CHOOSE(NAME, TYPE)                                                                      \
    /* The first of the highest; not a number is higher than all, as for torch. */               \
    static long highest_of_##NAME(const TYPE *row, long width) {                                 \
        float highest = -INFINITY;                                                               \
        for (long at = 0; at < width; at++) {                                                    \
            float value = read_##NAME(row[at]);                                                  \
            highest = value > highest || value != value ? value : highest;                       \
            if (value != value) return at;                                                       \
        }                                                                                        \
        for (long at = 0; at < width; at++)                                                      \
            if (read_##NAME(row[at]) == highest) return at;                                      \
        return 0;                                                                                \
    }                                                                                            \
    void highest_##NAME(const TYPE *logits, int64_t *chosen, long rows, long width, int threads) { \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")       \
        for (long row = 0; row < rows; row++)                                                    \
            chosen[row] = highest_of_##NAME(logits + row * width, width);                        \
    }                                                                                            \
    /* -1 where the winner's lead is within the margin, or a score is not a number. Tokens whose \
     * noise cannot make them win are passed over without a logarithm.                           \
     */                                                                                          \
    static long drawn_##NAME(const TYPE *row, long width, double temperature,                     \
                             const uint64_t *key, uint64_t position) {                           \
        Leader leader = {-INFINITY, -INFINITY, -INFINITY, -1};                                              \
        uint64_t words[4];                                                                       \
        for (long at = 0; at < width; at++) {                                                    \
            if (at % 4 == 0) philox(key, at / 4 + 1, position, words);                           \
            double score = (double)read_##NAME(row[at]) / temperature;                           \
            double draw = uniform(words[at % 4]);                                                \
            if (score != score) return -1;                                                       \
            if (score + bound(draw) < leader.limit) continue;                               \
            consider(&leader, score - log(-log(draw)), at);                                      \
        }                                                                                        \
        double margin = MARGIN * (1.0 + fabs(leader.best));                                      \
        return leader.best - leader.next > margin && isfinite(leader.best) ? leader.place : -1;  \
    }                                                                                            \
    void draw_##NAME(const TYPE *logits, const double *temperatures, const uint64_t *keys,        \
                     const uint64_t *positions, int64_t *chosen, long rows, long width,          \
                     int threads) {                                                              \
        _Pragma("omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)")      \
        for (long row = 0; row < rows; row++)                                                    \
            chosen[row] = drawn_##NAME(logits + row * width, width, temperatures[row],           \
                                       keys + 2 * row, positions[row]);                          \
    }

CHOOSE(f32, float)
CHOOSE(bf16, uint16_t)
