/* The forward pass in 16 bits: logits are products of integers, and weights and values are rounded to bfloat16.
 *
 * Levels are whole numbers, so that what is relative to one is relative to another by a power of two, exactly. What
 * weights are rounded to is also what they add up to. docs/bounds.md counts what is lost.
 */
#include "blocks.h"
#include "forward.h"
#include "halves.h"

/* Whether the processor has instructions for it. */
__attribute__((visibility("default"))) const int32_t attention_lab_has_halves = HALVES;

#if HALVES

typedef struct {
  int32_t *keys, *values, *weights, *queries;
  float *logits, *key_scales, *query_scales;
  sofar found;
} room;

INLINE int64_t pairs(int64_t n) { return (n + 1) / 2; }

static room room_for(const problem *p) {
  const int64_t width = up_to(p->E, PANEL), panels = panels_of(p), depth = pairs(p->H);
  const int64_t sizes[] = {KEYS * depth,
                           KEYS / 2 * width,
                           KEYS / 2 * PANEL,
                           KEYS * PANEL,
                           panels * depth * PANEL,
                           KEYS,
                           panels * PANEL,
                           panels * PANEL * width,
                           panels * PANEL,
                           panels * PANEL,
                           (int64_t)(panels * sizeof(sight) + 3) / 4};
  float *at[11];
  workspace(at, sizes, 11);
  return (room){(int32_t *)at[0], (int32_t *)at[1], (int32_t *)at[2], (int32_t *)at[4], at[3], at[5], at[6],
                {at[7], at[8], at[9], (sight *)at[10]}};
}

/* The least whole number that is not below x, where x is less than 2^22 in size; a whole number near it elsewhere. */
INLINE vec level(vec x) {
  const vec rounds = fill(12582912.0f), nearest = (x + rounds) - rounds;
  return nearest + pick(nearest < x, fill(1), fill(0));
}

INLINE void logits(const problem *p, const room *r, tile *t, int64_t panel, stretch keys, int key,
                   vec block[ROWS][COLUMNS]) {
  const int depth = pairs(p->H);
  ivec whole[ROWS][COLUMNS];
  product_of_integers(whole, depth, r->keys + key * depth, depth, 1, r->queries + panel * depth * PANEL, PANEL);
  ask_ahead(t);
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < COLUMNS; j++)
      block[i][j] = __builtin_convertvector(whole[i][j], vec) * r->key_scales[key + i] *
                    load(r->query_scales + panel * PANEL + j * LANES);
  if (keys.masked) hide(p, r->found.sights + panel, t->b, t->start + key, block);
}

INLINE void weights(const room *r, int key, vec block[ROWS][COLUMNS], const vec shift[COLUMNS], vec totals[COLUMNS]) {
  const ivec ones = (ivec){0} + 0x3F803F80; /* of bfloat16 */
  UNROLLED for (int i = 0; i < ROWS; i += 2)
    UNROLLED for (int j = 0; j < COLUMNS; j++) {
      const ivec both = pairs_of(short_power(block[i][j] - shift[j]), short_power(block[i + 1][j] - shift[j]));
      totals[j] = add_bfloat16(totals[j], both, ones);
      store_pairs(r->weights + (key + i) / 2 * PANEL + j * LANES, both);
    }
}

#include "levels.h"

/* As in float32, over `depth` pairs of keys. */
APART void add_values(float *to, int64_t width, const int32_t *weights, const int32_t *values, int depth) {
  vec block[ROWS][COLUMNS];
  product_of_bfloat16(block, depth, weights, 1, PANEL, values, width);
  add_block(to, width, block);
}

static void step(const problem *p, const void *context, tile *t, int64_t panel, stretch keys) {
  const room *r = context;
  const int64_t width = up_to(p->E, PANEL);
  float *outputs = r->found.outputs + panel * PANEL * width;
  ivec rises[COLUMNS];
  if (!weigh(p, r, t, panel, keys, rises)) weigh_rising(p, r, t, panel, keys, rises);
  for (int64_t e = 0; e < width; e += PANEL)
    for (int q = 0; q < PANEL; q += ROWS) {
      const span seen = keys_of_rows(r->found.sights + panel, q, t->start, keys);
      const int64_t begin = seen.begin / 2;
      add_values(outputs + q * width + e, width, r->weights + begin * PANEL + q, r->values + begin * width + e,
                 pairs(seen.end) - begin);
    }
}

/* A panel upright: rows of PANEL pairs, and the scales of their rows, times log2(e). */
static void pack_queries(const problem *p, const void *context, place at, int64_t g, int64_t panel) {
  const room *r = context;
  const int64_t rows = least(PANEL, p->T - at.from), depth = pairs(p->H);
  int32_t *to = r->queries + panel * depth * PANEL;
  for (int64_t q = 0; q < PANEL; q++) {
    const int64_t n = at_query(p, at.b, at.from + least(q, rows - 1), at.k, g, 1);
    const int16_t *from = p->short_query + n * p->H;
    r->query_scales[panel * PANEL + q] = p->query_scale[n] * LOG2E;
    for (int64_t h = 0; h < depth; h++) to[h * PANEL + q] = 0;
    for (int64_t h = 0; h < p->H; h++) to[h / 2 * PANEL + q] |= (int32_t)((uint32_t)(uint16_t)from[h] << h % 2 * 16);
  }
}

/* A row of pairs, of one row of values and of the next, where there are such. */
INLINE void pack_pair(int32_t *to, int64_t width, const uint16_t *lower, const uint16_t *upper, int64_t size) {
  int64_t e = 0;
  for (; lower && upper && e + LANES <= size; e += LANES)
    store_pairs(to + e, integers(*(const halves *)(lower + e)) | integers(*(const halves *)(upper + e)) << 16);
  for (; e < size; e++) to[e] = (int32_t)((lower ? lower[e] : 0) | (uint32_t)(upper ? upper[e] : 0) << 16);
  memset(to + size, 0, (width - size) * sizeof(int32_t));
}

static void pack_keys(const problem *p, const void *context, tile *t, place at, int64_t first, int64_t count) {
  const room *r = context;
  const int64_t start = t->start, width = up_to(p->E, PANEL), depth = pairs(p->H), begin = first - start, end = begin + count;
  const uint16_t *values[2];
  for (int64_t i = 0; i < KEYS; i++) {
    const int64_t n = at_key(p, at.b, start + i, at.k, 1), here = begin <= i && i < end;
    r->key_scales[i] = here ? p->key_scale[n] : 0;
    r->keys[(i + 1) * depth - 1] = 0;
    if (here)
      memcpy(r->keys + i * depth, p->short_key + n * p->H, p->H * sizeof(int16_t));
    else
      memset(r->keys + i * depth, 0, depth * sizeof(int32_t));
    values[i % 2] = here ? (const uint16_t *)p->value.data + n * p->E : 0;
    if (i % 2) pack_pair(r->values + i / 2 * width, width, values[0], values[1], p->E);
  }
}

static void item(const void *context, int64_t n) {
  const problem *p = context;
  const room r = room_for(p);
  pass(p, place_of(p, n), place_of(p, n + p->threads), &r.found, &r, (passing){pack_queries, pack_keys, step});
}

void halved(const problem *given, const threads *pool) {
  problem p = *given;
  p.threads = pool_size(pool);
  share(pool, p.B * p.K * blocks_of(&p, numbers_of(&p)), item, &p);
}

#endif
