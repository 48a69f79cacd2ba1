/* Softmax attention by online softmax over tiles of keys, for a block of queries at a time.
 *
 * Logits stand upright, keys by queries: maxima, exponentials and sums of a query are then those of a lane, and neither
 * keys nor values are transposed. A block of queries of all heads that share a key head passes over the same tiles.
 */
#include "forward.h"

#include "blocks.h"
#include "cap.h"

typedef struct {
  float *keys, *values, *weights, *logits, *queries; /* weights take the place of logits */
  sofar found;
} room;

static room room_for(const problem *p) {
  const int64_t width = up_to(p->E, PANEL), panels = panels_of(p);
  const int64_t sizes[] = {KEYS * up_to(p->H, PANEL),
                           KEYS * width,
                           KEYS * PANEL,
                           panels * p->H * PANEL,
                           panels * PANEL * width,
                           panels * PANEL,
                           panels * PANEL,
                           (int64_t)(panels * sizeof(sight) + 3) / 4};
  float *at[8];
  workspace(at, sizes, 8);
  return (room){at[0], at[1], at[2], at[2], at[3], {at[4], at[5], at[6], (sight *)at[7]}};
}

INLINE void logits(const problem *p, const room *r, tile *t, int64_t panel, stretch keys, int key,
                   vec block[ROWS][COLUMNS]) {
  const int64_t width = up_to(p->H, PANEL);
  ask_ahead(t);
  product(block, p->H, t->rows.keys + key * width, width, 1, r->queries + panel * p->H * PANEL, PANEL);
  if (p->caps) cap(p, t->b, block, 0);
  if (keys.masked) hide(p, r->found.sights + panel, t->b, t->start + key, block);
}

INLINE void weights(const room *r, int key, vec block[ROWS][COLUMNS], const vec shift[COLUMNS], vec totals[COLUMNS]) {
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < COLUMNS; j++) {
      const vec weight = power(block[i][j] - shift[j]);
      totals[j] += weight;
      store(r->weights + (key + i) * PANEL + j * LANES, weight);
    }
}

INLINE vec level(vec largest) { return largest; }

#include "levels.h"

/* to, ROWS by PANEL numbers of rows `width` apart, += the product of weights and values. */
APART void add_values(float *to, int64_t width, const float *weights, const float *values, int depth) {
  vec block[ROWS][COLUMNS];
  product(block, depth, weights, 1, PANEL, values, width);
  add_block(to, width, block);
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
      add_values(outputs + q * width + e, width, r->weights + seen.begin * PANEL + q,
                 t->rows.values + seen.begin * width + e, seen.end - seen.begin);
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
