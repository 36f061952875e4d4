/* softmax(q k^T scale + mask) v without the score matrix (FlashAttention, arXiv 2205.14135; online softmax, arXiv 1805.02867).
 *
 * A task is QUERIES queries of one head. It goes over the keys a block at a time; a block of keys and values stays in the
 * second-level cache, the scores of a few queries in the first. Keys and values are packed once per head into the order in which
 * the innermost loops read them. bfloat16 products are summed in float32 by the processor's own dot product of pairs, or by its
 * matrix unit (AMX), whose tiles read the same order.
 */
#if defined(__linux__) && defined(__AMX_BF16__) && defined(BFLOAT16)
#define _GNU_SOURCE
#define MATRICES
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "vector.h"
#ifdef BFLOAT16
#include <immintrin.h>
#endif

/* Queries at a time: as many as registers hold sums of, or two tiles of the matrix unit. */
enum { ROWS = 6, MATRIX_ROWS = 32, QUERIES = 96, TILE = LANES == 8 ? 2 : 4, KEYS = TILE * LANES };

/* How many neighbours one lane multiplies at once, and the multiply-add of a vector of them. */
#ifdef BFLOAT16
enum { PAIR = 2 };
typedef __m512bh packed;
#define MULTIPLY_ADD(sum, a, b) ((vec)_mm512_dpbf16_ps((__m512)(sum), a, b))
static inline packed broadcast(const element *p) {
    int32_t both;
    memcpy(&both, p, sizeof both);
    return (packed)_mm512_set1_epi32(both);
}
#else
enum { PAIR = 1 };
typedef vec packed;
#define MULTIPLY_ADD(sum, a, b) ((sum) + (a) * (b))
static inline packed broadcast(const element *p) { return splat(*p); }
#endif

/* Finite, as the difference of two infinities is none. A key that is not there, or masked by -inf, scores ABSENT, below NOTHING,
 * the best score of a row that has seen no key. The lowest finite mask is cut at LOWEST, far above it: where all keys are masked
 * alike, all weigh the same. */
#define ABSENT -1e38f
#define NOTHING -1e36f
#define LOWEST -1e30f

enum { WIDTH = LANES * PAIR }; /* elements in one packed vector */

static inline packed load_packed(const element *p) {
    packed x;
    memcpy(&x, p, sizeof x);
    return x;
}

typedef struct {
    int64_t batch, heads, row; /* elements from one to the next */
} strides;

typedef struct {
    const element *q, *k, *v;
    element *out;
    const float *mask; /* or NULL; its rows are contiguous */
    int64_t heads, queries, keys, depth;
    strides q_strides, k_strides, v_strides, out_strides, mask_strides;
    float scale; /* times log2(e) */
} problem;

/* Rounded sizes: depth of keys to whole pairs or tiles, of values to whole vectors; keys to whole vectors or tiles. */
typedef struct {
    int64_t depth_k, depth_v, keys, block, rows; /* rows: queries at a time */
} padded;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* sum[r][j] += a[r][:] . b[:, j] for ROWS rows and `tiles` vectors; b is packed: depth/PAIR rows of `step` elements. */
#define DOT_ROWS(tiles)                                                                                                       \
    static inline void dot_rows_##tiles(                                                                                      \
        const element *a, int64_t a_step, const element *b, int64_t b_step, int64_t depth, float *sum, int64_t sum_step, int fresh) { \
        vec s[ROWS][tiles];                                                                                                   \
        for (int r = 0; r < ROWS; r++)                                                                                        \
            for (int j = 0; j < tiles; j++) s[r][j] = fresh ? splat(0) : load(sum + r * sum_step + j * LANES);                \
        for (int64_t i = 0; i < depth; i += PAIR) {                                                                           \
            packed row[tiles];                                                                                                \
            for (int j = 0; j < tiles; j++) row[j] = load_packed(b + j * WIDTH);                                              \
            b += b_step;                                                                                                      \
            _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) {                                                          \
                packed x = broadcast(a + r * a_step + i);                                                                     \
                for (int j = 0; j < tiles; j++) s[r][j] = MULTIPLY_ADD(s[r][j], x, row[j]);                                   \
            }                                                                                                                 \
        }                                                                                                                     \
        for (int r = 0; r < ROWS; r++)                                                                                        \
            for (int j = 0; j < tiles; j++) store(sum + r * sum_step + j * LANES, s[r][j]);                                   \
    }
DOT_ROWS(1)
DOT_ROWS(2)
#if LANES != 8
DOT_ROWS(3)
DOT_ROWS(4)
#endif

#ifdef MATRICES
enum { SIDE = 16, STEP = 32 }; /* a tile is SIDE rows of 64 bytes: of STEP elements, or of SIDE sums */

/* Whether the system lets this process use the matrix unit: it keeps more of a thread then. Asked once. */
static int matrices(void) {
    static int allowed = -1;
    if (allowed < 0) allowed = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */);
    return allowed;
}

/* All eight tiles of this thread at their full size. */
static void shape_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = SIDE;
    _tile_loadconfig(&shape);
}

/* What dot_rows does, for MATRIX_ROWS rows; depth is a multiple of STEP. */
static void dot_tiles(
    int64_t tiles, const element *a, int64_t a_step, const element *b, int64_t b_step, int64_t depth, float *sum, int64_t sum_step, int fresh) {
    const element *below = a + SIDE * a_step;
    for (int64_t j = 0; j < tiles; j += 2) {
        int both = j + 1 < tiles;
        float *top = sum + j * SIDE, *bottom = top + SIDE * sum_step;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if (!fresh) {
            _tile_loadd(0, top, 4 * sum_step);
            _tile_loadd(1, bottom, 4 * sum_step);
        }
        if (!fresh && both) {
            _tile_loadd(2, top + SIDE, 4 * sum_step);
            _tile_loadd(3, bottom + SIDE, 4 * sum_step);
        }
        for (int64_t i = 0; i < depth; i += STEP) {
            const element *right = b + i / PAIR * b_step + j * WIDTH;
            _tile_loadd(4, a + i, 2 * a_step);
            _tile_loadd(5, below + i, 2 * a_step);
            _tile_loadd(6, right, 2 * b_step);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (!both) continue;
            _tile_loadd(7, right + WIDTH, 2 * b_step);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, top, 4 * sum_step);
        _tile_stored(1, bottom, 4 * sum_step);
        if (!both) continue;
        _tile_stored(2, top + SIDE, 4 * sum_step);
        _tile_stored(3, bottom + SIDE, 4 * sum_step);
    }
}
#endif

static inline void dot_rows(
    int64_t tiles, const element *a, int64_t a_step, const element *b, int64_t b_step, int64_t depth, float *sum, int64_t sum_step, int fresh) {
    switch (tiles) {
    case 1: dot_rows_1(a, a_step, b, b_step, depth, sum, sum_step, fresh); break;
    case 2: dot_rows_2(a, a_step, b, b_step, depth, sum, sum_step, fresh); break;
#if LANES != 8
    case 3: dot_rows_3(a, a_step, b, b_step, depth, sum, sum_step, fresh); break;
    default: dot_rows_4(a, a_step, b, b_step, depth, sum, sum_step, fresh); break;
#endif
    }
}

#ifdef MATRICES
#define DOT(n, ...) ((n)->rows == MATRIX_ROWS ? dot_tiles(__VA_ARGS__) : dot_rows(__VA_ARGS__))
#else
#define DOT(n, ...) dot_rows(__VA_ARGS__)
#endif

/* Keys [from, from + KEYS) of a head: depth_k / PAIR rows, in each the PAIR neighbours of every key side by side. */
static void pack_keys(const problem *p, const padded *n, const element *k, element *to, int64_t from) {
    int64_t count = n->keys - from < KEYS ? n->keys - from : KEYS;
    memset(to, 0, sizeof(element) * count * n->depth_k);
    for (int64_t key = 0; key < count && from + key < p->keys; key++) {
        const element *row = k + (from + key) * p->k_strides.row;
        for (int64_t c = 0; c < p->depth; c++) to[(c / PAIR * count + key) * PAIR + c % PAIR] = row[c];
    }
}

/* Values [from, from + KEYS) of a head: keys / PAIR rows, in each the PAIR neighbouring keys of every channel side by side. */
static void pack_values(const problem *p, const padded *n, const element *v, element *to, int64_t from) {
    int64_t count = n->keys - from < KEYS ? n->keys - from : KEYS;
    memset(to, 0, sizeof(element) * count * n->depth_v);
    for (int64_t key = 0; key < count && from + key < p->keys; key++) {
        const element *row = v + (from + key) * p->v_strides.row;
        element *line = to + key / PAIR * n->depth_v * PAIR + key % PAIR;
        for (int64_t c = 0; c < p->depth; c++) line[c * PAIR] = row[c];
    }
}

/* What one thread works with. */
typedef struct {
    element *q, *weights;
    float *scores, *out, *best, *total;
} workspace;

/* The largest of `count` scores; four at a time, as each comparison waits for the one before. */
static float largest(const float *s, int64_t count) {
    vec top[4] = {splat(ABSENT), splat(ABSENT), splat(ABSENT), splat(ABSENT)};
    int64_t j = 0;
    for (; j + 4 * LANES <= count; j += 4 * LANES)
        for (int i = 0; i < 4; i++) top[i] = vmax(top[i], load(s + j + i * LANES));
    for (; j < count; j += LANES) top[0] = vmax(top[0], load(s + j));
    return max_of(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
}

/* Weights exp2((score - best) scale) of `count` scores, never more than 1; returns their sum. */
static float weigh(const float *s, element *weight, int64_t count, float scale, float best) {
    vec sum[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t j = 0;
    for (; j + 4 * LANES <= count; j += 4 * LANES)
        for (int i = 0; i < 4; i++) {
            vec y = exp2_of((load(s + j + i * LANES) - best) * scale);
            sum[i] += y;
            STORE(weight + j + i * LANES, y);
        }
    for (; j < count; j += LANES) {
        vec y = exp2_of((load(s + j) - best) * scale);
        sum[0] += y;
        STORE(weight + j, y);
    }
    return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* Scores (rows at a time, count) to weights, rescaling what was summed before where the largest score grows. */
static void soften(const problem *p, const padded *n, workspace *w, int64_t row, int64_t rows, int64_t count, int64_t past_end,
                   const float *mask) {
    for (int64_t r = 0; r < n->rows; r++) {
        float *s = w->scores + r * n->block, *out = w->out + (row + r) * n->depth_v;
        if (mask && row + r < rows) { /* the mask is in units of the softmax; scores are still unscaled */
            const float *add = mask + r * p->mask_strides.row, unscaled = 1.44269504f / p->scale;
            for (int64_t j = 0; j < count - past_end; j++)
                s[j] += add[j] == -INFINITY ? ABSENT : (add[j] < LOWEST ? LOWEST : add[j]) * unscaled;
        }
        for (int64_t j = count - past_end; j < count; j++) s[j] = ABSENT;
        float best = largest(s, count), old = w->best[row + r];
        if (best > old) {
            float shrink = exp2f((old - best) * p->scale);
            w->best[row + r] = best;
            w->total[row + r] *= shrink;
            for (int64_t c = 0; c < n->depth_v; c += LANES) store(out + c, load(out + c) * shrink);
        }
        w->total[row + r] += weigh(s, w->weights + r * n->block, count, p->scale, w->best[row + r]);
    }
}

static void attend(const problem *p, const padded *n, workspace *w, const element *q, const element *keys, const element *values,
                   element *out, const float *mask, int64_t rows) {
    int64_t all = round_up(rows, n->rows);
    memset(w->q, 0, sizeof(element) * all * n->depth_k);
    for (int64_t r = 0; r < rows; r++) memcpy(w->q + r * n->depth_k, q + r * p->q_strides.row, sizeof(element) * p->depth);
    for (int64_t r = 0; r < all; r++) w->best[r] = NOTHING, w->total[r] = 0;
    memset(w->out, 0, sizeof(float) * all * n->depth_v);
    for (int64_t from = 0; from < n->keys; from += n->block) {
        int64_t count = n->keys - from < n->block ? n->keys - from : n->block;
        int64_t past_end = from + count > p->keys ? from + count - p->keys : 0;
        for (int64_t row = 0; row < all; row += n->rows) {
            for (int64_t j = 0; j < count; j += KEYS) {
                int64_t tile = count - j < KEYS ? count - j : KEYS;
                DOT(n, tile / LANES, w->q + row * n->depth_k, n->depth_k, keys + (from + j) * n->depth_k, tile * PAIR, n->depth_k,
                    w->scores + j, n->block, 1);
            }
            soften(p, n, w, row, rows, count, past_end, mask ? mask + row * p->mask_strides.row + from : NULL);
            int64_t vectors = n->depth_v / LANES, parts = (vectors + TILE - 1) / TILE;
            for (int64_t part = 0, at = 0; part < parts; part++) { /* shares as even as they can be */
                int64_t tiles = (vectors - at + parts - part - 1) / (parts - part);
                DOT(n, tiles, w->weights, n->block, values + from * n->depth_v + at * WIDTH, n->depth_v * PAIR, count,
                    w->out + row * n->depth_v + at * LANES, n->depth_v, 0);
                at += tiles;
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        /* The best key weighs 1, so less is none: every key is masked by -inf, which torch makes 0 as well. */
        float share = w->total[r] < 0.5f ? 0 : 1 / w->total[r];
        for (int64_t c = 0; c < p->depth; c++) out[r * p->out_strides.row + c] = PUT(w->out[r * n->depth_v + c] * share);
    }
}

static int carve(workspace *w, const padded *n) {
    size_t q = QUERIES * n->depth_k * sizeof(element), weights = n->rows * n->block * sizeof(element);
    size_t scores = n->rows * n->block * sizeof(float), out = QUERIES * n->depth_v * sizeof(float), rows = QUERIES * sizeof(float);
    char *at = aligned_alloc(64, round_up(q + weights + scores + out + 2 * rows + 6 * 64, 64));
    if (!at) return 0;
    w->q = (element *)at, at += round_up(q, 64);
    w->weights = (element *)at, at += round_up(weights, 64);
    w->scores = (float *)at, at += round_up(scores, 64);
    w->out = (float *)at, at += round_up(out, 64);
    w->best = (float *)at, at += round_up(rows, 64);
    w->total = (float *)at;
    return 1;
}

/* Returns 0, or 1 where memory ran out. */
int attention(const element *q, const element *k, const element *v, element *out, const float *mask, int64_t batch, int64_t heads,
              int64_t queries, int64_t keys, int64_t depth, strides q_strides, strides k_strides, strides v_strides,
              strides out_strides, strides mask_strides, float scale) {
    problem p = {q, k, v, out, mask, heads, queries, keys, depth, q_strides, k_strides, v_strides, out_strides, mask_strides,
                 scale * 1.44269504f};
    padded n = {round_up(depth, PAIR), round_up(depth, LANES), round_up(keys, LANES), depth > 160 ? 256 : 512, ROWS};
#ifdef MATRICES
    if (matrices()) n = (padded){round_up(depth, STEP), round_up(depth, LANES), round_up(keys, STEP), 256, MATRIX_ROWS};
#endif
    int64_t tiles = (n.keys + KEYS - 1) / KEYS, blocks = (queries + QUERIES - 1) / QUERIES;
    int64_t head_k = n.keys * n.depth_k, head_v = n.keys * n.depth_v;
    element *packed_k = aligned_alloc(64, round_up(heads * head_k * sizeof(element), 64));
    element *packed_v = aligned_alloc(64, round_up(heads * head_v * sizeof(element), 64));
    int failed = !packed_k || !packed_v;
    if (failed) goto end;
#pragma omp parallel
    {
        workspace w = {0};
        int ready = carve(&w, &n);
        if (!ready) failed = 1;
#ifdef MATRICES
        if (n.rows == MATRIX_ROWS) shape_tiles();
#endif
#pragma omp barrier
        for (int64_t b = 0; b < batch && !failed; b++) {
#pragma omp for schedule(static)
            for (int64_t task = 0; task < heads * tiles; task++) {
                int64_t h = task / tiles, from = task % tiles * KEYS;
                pack_keys(&p, &n, k + b * k_strides.batch + h * k_strides.heads, packed_k + h * head_k + from * n.depth_k, from);
                pack_values(&p, &n, v + b * v_strides.batch + h * v_strides.heads, packed_v + h * head_v + from * n.depth_v, from);
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < heads * blocks; task++) {
                int64_t h = task / blocks, row = task % blocks * QUERIES;
                int64_t rows = queries - row < QUERIES ? queries - row : QUERIES;
                attend(&p, &n, &w, q + b * q_strides.batch + h * q_strides.heads + row * q_strides.row, packed_k + h * head_k,
                       packed_v + h * head_v, out + b * out_strides.batch + h * out_strides.heads + row * out_strides.row,
                       mask ? mask + b * mask_strides.batch + h * mask_strides.heads + row * mask_strides.row : NULL, rows);
            }
        }
#ifdef MATRICES
        if (n.rows == MATRIX_ROWS) _tile_release();
#endif
        if (ready) free(w.q);
    }
end:
    free(packed_k);
    free(packed_v);
    return failed;
}
