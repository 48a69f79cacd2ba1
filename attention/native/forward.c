/* Softmax attention by online softmax over tiles of keys, for a block of queries at a time.
 *
 * Logits stand upright, keys by queries: maxima, exponentials and sums of a query are then those of a lane, and neither
 * keys nor values are transposed. A block of queries of all heads that share a key head passes over the same tiles.
 */
#include "forward.h"

#include "blocks.h"
#include "cap.h"

typedef struct {
  float *keys, *values, *weights, *queries;
  sofar found;
} room;

static room room_for(const problem *p) {
  const int64_t width = up_to(p->E, PANEL), panels = panels_of(p);
  const int64_t sizes[] = {KEYS * up_to(p->H, PANEL), KEYS * width, KEYS * PANEL, panels * p->H * PANEL, panels * PANEL * width,
                           panels * PANEL, panels * PANEL, (int64_t)(panels * sizeof(sight) + 3) / 4};
  float *at[8];
  workspace(at, sizes, 8);
  return (room){at[0], at[1], at[2], at[3], {at[4], at[5], at[6], (sight *)at[7]}};
}

/* The logits of ROWS keys from `key` on, in powers of two, for a panel of queries. */
INLINE void logits_of(const problem *p, const room *r, tile *t, int64_t panel, stretch keys, int key,
                      vec block[ROWS][COLUMNS]) {
  const int64_t width = up_to(p->H, PANEL);
  ask_ahead(t);
  product(block, p->H, t->rows.keys + key * width, width, 1, r->queries + panel * p->H * PANEL, PANEL);
  if (p->caps) cap(p, t->b, block, 0);
  if (keys.masked) hide(p, r->found.sights + panel, t->b, t->start + key, block);
}

/* 2^(logits - shift), kept and added to the totals. */
INLINE void weights_from(const vec block[ROWS][COLUMNS], const vec shift[COLUMNS], float *weights, vec totals[COLUMNS]) {
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < COLUMNS; j++) {
      vec weight = power(block[i][j] - shift[j]);
      totals[j] += weight;
      store(weights + i * PANEL + j * LANES, weight);
    }
}

/* The weights of a tile of keys for a panel of queries, relative to levels that stay, and their sums. Which levels should
 * have risen is in `rises`: those that are none yet, and those to which weights are large, as their sum tells; what
 * other queries see does not matter. If there are any it returns 0, and has changed nothing. */
static __attribute__((noinline)) int weigh(const problem *p, const room *r, tile *t, int64_t panel, stretch keys,
                                           ivec rises[COLUMNS]) {
  float *levels = r->found.levels + panel * PANEL, *sums = r->found.sums + panel * PANEL;
  vec block[ROWS][COLUMNS], shift[COLUMNS], totals[COLUMNS];
  ivec some = {0}, none = {0};
  UNROLLED for (int j = 0; j < COLUMNS; j++) {
    rises[j] = load(levels + j * LANES) == -INFINITY, some |= ~rises[j];
    shift[j] = or_zero(load(levels + j * LANES)), totals[j] = (vec){0};
  }
  if (!any(some)) return 0;
  pace(t, keys);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    logits_of(p, r, t, panel, keys, key, block);
    weights_from(block, shift, r->weights + key * PANEL, totals);
  }
  UNROLLED for (int j = 0; j < COLUMNS; j++) none |= rises[j] |= totals[j] > MOST;
  if (any(none)) return 0;
  UNROLLED for (int j = 0; j < COLUMNS; j++) store(sums + j * LANES, load(sums + j * LANES) + totals[j]);
  return 1;
}

/* What a panel has found so far, relative to levels that have risen. */
static void rescale(const problem *p, const room *r, int64_t panel, const float factors[PANEL]) {
  const int64_t width = up_to(p->E, PANEL);
  for (int64_t q = 0; q < PANEL; q++) {
    const int64_t row = panel * PANEL + q;
    r->found.sums[row] *= factors[q];
    for (int64_t e = 0; factors[q] != 1 && e < width; e += LANES)
      store(r->found.outputs + row * width + e, load(r->found.outputs + row * width + e) * factors[q]);
  }
}

/* As above, but that levels which are to rise become the largest of the tile's logits, once these are known. */
static __attribute__((noinline)) void weigh_rising(const problem *p, const room *r, tile *t, int64_t panel, stretch keys,
                                                   const ivec rises[COLUMNS]) {
  float *levels = r->found.levels + panel * PANEL, *sums = r->found.sums + panel * PANEL, factors[PANEL];
  vec block[ROWS][COLUMNS], level[COLUMNS], shift[COLUMNS], totals[COLUMNS];
  UNROLLED for (int j = 0; j < COLUMNS; j++) level[j] = load(levels + j * LANES);
  pace(t, keys);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    logits_of(p, r, t, panel, keys, key, block);
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++) {
        level[j] = pick(rises[j], larger(block[i][j], level[j]), level[j]);
        store(r->weights + (key + i) * PANEL + j * LANES, block[i][j]);
      }
  }
  for (int j = 0; j < COLUMNS; j++) {
    shift[j] = or_zero(level[j]), totals[j] = (vec){0};
    store(factors + j * LANES, power(load(levels + j * LANES) - shift[j]));
    store(levels + j * LANES, level[j]);
  }
  rescale(p, r, panel, factors);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    float *weights = r->weights + key * PANEL;
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++) block[i][j] = load(weights + i * PANEL + j * LANES);
    weights_from(block, shift, weights, totals);
  }
  UNROLLED for (int j = 0; j < COLUMNS; j++) store(sums + j * LANES, load(sums + j * LANES) + totals[j]);
}

/* One tile of keys for one panel of queries. */
static void step(const problem *p, const void *context, tile *t, int64_t panel, stretch keys) {
  const room *r = context;
  const int64_t width = up_to(p->E, PANEL);
  float *outputs = r->found.outputs + panel * PANEL * width;
  ivec rises[COLUMNS];
  if (!weigh(p, r, t, panel, keys, rises)) weigh_rising(p, r, t, panel, keys, rises);
  for (int64_t e = 0; e < width; e += PANEL)
    for (int q = 0; q < PANEL; q += ROWS) {
      const span seen = keys_of_rows(r->found.sights + panel, q, t->start, keys);
      vec block[ROWS][COLUMNS];
      product(block, seen.end - seen.begin, r->weights + seen.begin * PANEL + q, 1, PANEL,
              t->rows.values + seen.begin * width + e, width);
      UNROLLED for (int i = 0; i < ROWS; i++)
        UNROLLED for (int j = 0; j < COLUMNS; j++) {
          float *at = outputs + (q + i) * width + e + j * LANES;
          store(at, load(at) + block[i][j]);
        }
    }
}

static void pack_queries(const problem *p, const void *context, place at, int64_t g, int64_t panel) {
  const room *r = context;
  pack_upright(r->queries + panel * p->H * PANEL, p->query + at_query(p, at.b, at.from, at.k, g, p->H),
               p->K * p->G * p->H, least(PANEL, p->T - at.from), p->H, LOG2E);
}

static void pack_keys(const problem *p, const void *context, tile *t, place at, int64_t first, int64_t count) {
  const room *r = context;
  t->rows = pack_of(p, at.b, at.k, t->start, first, count, r->keys, r->values);
}

static void item(const void *context, int64_t n) {
  const problem *p = context;
  const room r = room_for(p);
  pass(p, place_of(p, n), place_of(p, n + p->threads), &r.found, &r, (passing){pack_queries, pack_keys, step});
}

void forward(const problem *given, const threads *pool) {
  problem p = *given;
  p.threads = pool_size(pool);
  const int64_t blocks = blocks_of(&p, numbers_of(&p));
  pack_tiles(&p, blocks, pool);
  share(pool, p.B * p.K * blocks, item, &p);
}
