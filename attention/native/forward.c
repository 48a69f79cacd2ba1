/* Softmax attention by online softmax over tiles of keys, for a block of queries at a time.
 *
 * Logits stand upright, keys by queries: maxima, exponentials and sums of a query are then those of a lane, and neither
 * keys nor values are transposed. A block of queries of all heads that share a key head passes over the same tiles.
 */
#include "forward.h"

#include "ask.h"
#include "cap.h"
#include "pack.h"
#include "pool.h"
#include "sight.h"

#define BLOCK (2 * QUERIES) /* a query has less than half the state that it has in a backward pass */
#define SLACK 4 /* powers of two; docs/bounds.md counts what they cost */

typedef struct {
  float *keys, *values, *weights, *queries, *outputs, *levels, *sums;
  sight *sights;
} room;

static room room_for(const problem *p) {
  int64_t width = up_to(p->E, PANEL), panels = p->G * (block_of(p, BLOCK) / PANEL);
  int64_t sizes[] = {KEYS * p->H, KEYS * width,   KEYS * PANEL,  panels * p->H * PANEL, panels * PANEL * width,
                     panels * PANEL, panels * PANEL, (panels * sizeof(sight) + 3) / 4};
  float *parts[8];
  workspace(parts, sizes, 8);
  return (room){parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], (sight *)parts[7]};
}

/* Where a logit lies more than SLACK above the level that exponentials are relative to, it becomes the level, and sums
 * from the old one are rescaled; elsewhere all stays as it is, as 2^0 = 1. */
static void raise(vec levels[COLUMNS], const vec largest[COLUMNS], vec totals[COLUMNS], float *kept, float *weights,
                  int count) {
  for (int j = 0; j < COLUMNS; j++) {
    vec before = levels[j];
    levels[j] = pick(largest[j] > before + SLACK, largest[j], before);
    vec factor = power(before - or_zero(levels[j]));
    totals[j] *= factor;
    store(kept + j * LANES, load(kept + j * LANES) * factor);
    for (int i = 0; i < count; i++) {
      float *at = weights + i * PANEL + j * LANES;
      store(at, load(at) * factor);
    }
  }
}

/* The weights of a tile of keys for a panel of queries, and their sums. What came before is to be multiplied by `kept`. */
static void weigh(const problem *p, const room *r, tile *t, int64_t panel, stretch keys, float kept[PANEL]) {
  const float *queries = r->queries + panel * p->H * PANEL;
  float *tops = r->levels + panel * PANEL, *sums = r->sums + panel * PANEL;
  vec block[ROWS][COLUMNS], levels[COLUMNS], largest[COLUMNS], totals[COLUMNS];
  UNROLLED for (int j = 0; j < COLUMNS; j++) {
    levels[j] = load(tops + j * LANES), totals[j] = (vec){0};
    store(kept + j * LANES, fill(1));
  }
  pace(t, keys);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    ask_ahead(t);
    product(block, p->H, r->keys + key * p->H, p->H, 1, queries, PANEL);
    if (p->caps) cap(p, t->b, block, 0);
    if (keys.masked) hide(p, r->sights + panel, t->b, t->start + key, block);
    UNROLLED for (int j = 0; j < COLUMNS; j++) largest[j] = block[0][j];
    UNROLLED for (int i = 1; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++) largest[j] = larger(block[i][j], largest[j]);
    ivec higher = {0};
    UNROLLED for (int j = 0; j < COLUMNS; j++) higher |= largest[j] > levels[j] + SLACK;
    if (any(higher)) raise(levels, largest, totals, kept, r->weights + keys.begin * PANEL, key - keys.begin);
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++) {
        vec weight = power(block[i][j] - or_zero(levels[j]));
        totals[j] += weight;
        store(r->weights + (key + i) * PANEL + j * LANES, weight);
      }
  }
  UNROLLED for (int j = 0; j < COLUMNS; j++) {
    store(tops + j * LANES, levels[j]);
    store(sums + j * LANES, load(sums + j * LANES) * load(kept + j * LANES) + totals[j]);
  }
}

/* One tile of keys for one panel of queries. */
static void step(const problem *p, const room *r, tile *t, int64_t panel, stretch keys) {
  const int64_t width = up_to(p->E, PANEL);
  float *outputs = r->outputs + panel * PANEL * width, kept[PANEL];
  weigh(p, r, t, panel, keys, kept);
  for (int64_t e = 0; e < width; e += PANEL)
    for (int q = 0; q < PANEL; q += ROWS) {
      const span seen = keys_of_rows(r->sights + panel, q, t->start, keys);
      vec block[ROWS][COLUMNS];
      product(block, seen.end - seen.begin, r->weights + seen.begin * PANEL + q, 1, PANEL,
              r->values + seen.begin * width + e, width);
      UNROLLED for (int i = 0; i < ROWS; i++)
        UNROLLED for (int j = 0; j < COLUMNS; j++) {
          float *at = outputs + (q + i) * width + e + j * LANES;
          store(at, load(at) * kept[q + i] + block[i][j]);
        }
    }
}

/* The queries of a panel, and nothing summed yet. */
static void prepare(const problem *p, const room *r, int64_t panel, int64_t b, int64_t k, int64_t g, int64_t t) {
  const float *query = p->query + at_query(p, b, t, k, g, p->H);
  const int64_t width = up_to(p->E, PANEL);
  pack_upright(r->queries + panel * p->H * PANEL, query, p->K * p->G * p->H, least(PANEL, p->T - t), p->H, LOG2E);
  memset(r->outputs + panel * PANEL * width, 0, PANEL * width * sizeof(float));
  for (int64_t i = 0; i < PANEL; i++) r->levels[panel * PANEL + i] = -INFINITY, r->sums[panel * PANEL + i] = 0;
}

/* The rows of a panel: sums of weighted values over sums of weights. */
static void finish(const problem *p, const room *r, int64_t panel, int64_t b, int64_t k, int64_t g, int64_t t) {
  const int64_t width = up_to(p->E, PANEL);
  for (int64_t i = 0; i < least(PANEL, p->T - t); i++) {
    float sum = r->sums[panel * PANEL + i], level = r->levels[panel * PANEL + i];
    float *row = r->outputs + (panel * PANEL + i) * width, share = sum == 0 ? 0 : 1 / sum;
    for (int64_t e = 0; e < width; e += LANES) store(row + e, load(row + e) * share);
    memcpy(p->output + at_query(p, b, t + i, k, g, p->E), row, p->E * sizeof(float));
    p->level[at_level(p, b, k, g, t + i)] = sum == 0 ? -INFINITY : logf(sum) + level * LN2;
  }
}

/* The last blocks first: where causality shortens the others, the short ones fill up the end. */
static place place_of(const problem *p, int64_t n) {
  const int64_t blocks = blocks_of(p, BLOCK), heads = p->B * p->K;
  if (n >= heads * blocks) return (place){p->B};
  return (place){n % heads / p->K, n % p->K, (blocks - 1 - n / heads) * block_of(p, BLOCK)};
}

static void item(const void *context, int64_t n) {
  const problem *p = context;
  const room r = room_for(p);
  const place at = place_of(p, n), next = place_of(p, n + p->threads);
  const int64_t size = block_of(p, BLOCK), width = up_to(p->E, PANEL), b = at.b, k = at.k, from = at.from;
  const int64_t columns = (least(size, p->T - from) + PANEL - 1) / PANEL, panels = p->G * columns;
  int64_t begin = p->S, end = 0;

  for (int64_t i = 0; i < panels; i++) {
    r.sights[i] = sight_of(p, b, k, i / columns, from + i % columns * PANEL);
    begin = least(begin, r.sights[i].begin), end = most(end, r.sights[i].end);
  }
  const int64_t first_tile = begin / KEYS * KEYS;
  for (int64_t start = first_tile; start < end; start += KEYS) {
    int64_t first = most(start, begin), count = least(end, start + KEYS) - first;
    tile here = {.b = b, .start = start, .left = panels};
    int32_t range[2];
    segment_range(p, b, start, range);
    pack_tile(r.keys, p->H, beyond(p->key, at_key(p, b, first, k, p->H)), p->K * p->H, first - start, count, p->H);
    pack_tile(r.values, width, beyond(p->value, at_key(p, b, first, k, p->E)), p->K * p->E, first - start, count, p->E);
    want_next(&here, p, k, end, next);
    for (int64_t i = 0; i < panels; i++, here.left--) {
      const int64_t g = i / columns, t = from + i % columns * PANEL, after = i + 1;
      if (start == first_tile) {
        prepare(p, &r, i, b, k, g, t);
        if (after < panels) want_queries(&here.soon, p, b, k, after / columns, from + after % columns * PANEL);
      }
      stretch keys = stretch_of(p, r.sights + i, start, range);
      if (ends_in(r.sights + i, start)) want_panel(&here.soon, p, p->output, p->E, b, k, g, t, 1);
      if (keys.begin < keys.end) step(p, &r, &here, i, keys);
      if (ends_in(r.sights + i, start)) finish(p, &r, i, b, k, g, t);
    }
  }
  for (int64_t i = 0; i < panels; i++) { /* those that see no key */
    if (r.sights[i].end > 0) continue;
    prepare(p, &r, i, b, k, i / columns, from + i % columns * PANEL);
    finish(p, &r, i, b, k, i / columns, from + i % columns * PANEL);
  }
}

void forward(const problem *given, const threads *pool) {
  problem p = *given;
  p.threads = pool_size(pool);
  share(pool, p.B * p.K * blocks_of(&p, BLOCK), item, &p);
}
