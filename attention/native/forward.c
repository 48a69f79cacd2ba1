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
  const int64_t sizes[] = {KEYS * p->H,    KEYS * width,   KEYS * PANEL, panels * p->H * PANEL, panels * PANEL * width,
                           panels * PANEL, panels * PANEL, (int64_t)(panels * sizeof(sight) + 3) / 4};
  float *at[8];
  workspace(at, sizes, 8);
  return (room){at[0], at[1], at[2], at[3], {at[4], at[5], at[6], (sight *)at[7]}};
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
  float *tops = r->found.levels + panel * PANEL, *sums = r->found.sums + panel * PANEL;
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
    if (keys.masked) hide(p, r->found.sights + panel, t->b, t->start + key, block);
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
static void step(const problem *p, const void *context, tile *t, int64_t panel, stretch keys) {
  const room *r = context;
  const int64_t width = up_to(p->E, PANEL);
  float *outputs = r->found.outputs + panel * PANEL * width, kept[PANEL];
  weigh(p, r, t, panel, keys, kept);
  for (int64_t e = 0; e < width; e += PANEL)
    for (int q = 0; q < PANEL; q += ROWS) {
      const span seen = keys_of_rows(r->found.sights + panel, q, t->start, keys);
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

static void pack_queries(const problem *p, const void *context, place at, int64_t g, int64_t panel) {
  const room *r = context;
  pack_upright(r->queries + panel * p->H * PANEL, p->query + at_query(p, at.b, at.from, at.k, g, p->H),
               p->K * p->G * p->H, least(PANEL, p->T - at.from), p->H, LOG2E);
}

static void pack_keys(const problem *p, const void *context, place at, int64_t start, int64_t first, int64_t count) {
  const room *r = context;
  const int64_t width = up_to(p->E, PANEL), before = first - start;
  pack_tile(r->keys, p->H, beyond(p->key, at_key(p, at.b, first, at.k, p->H)), p->K * p->H, before, count, p->H);
  pack_tile(r->values, width, beyond(p->value, at_key(p, at.b, first, at.k, p->E)), p->K * p->E, before, count, p->E);
}

static void item(const void *context, int64_t n) {
  const problem *p = context;
  const room r = room_for(p);
  pass(p, place_of(p, n), place_of(p, n + p->threads), &r.found, &r, (passing){pack_queries, pack_keys, step});
}

void forward(const problem *given, const threads *pool) {
  problem p = *given;
  p.threads = pool_size(pool);
  share(pool, p.B * p.K * blocks_of(&p, queries_of(&p)), item, &p);
}
