/* What a tile of keys and a panel of queries, or a pair of them, add to the cotangents.
 *
 * P and dS stand upright, keys by the queries of a pair, so that all five products have one form.
 */
#ifndef COTANGENTS_H
#define COTANGENTS_H

#include "ask.h"
#include "cap.h"

#define PAIR (2 * PANEL) /* sums over its queries are added to dK and dV: half as often as those over a panel */

typedef struct {
  float *keys, *values, *weights, *changes, *d_keys, *d_values; /* of a tile of keys */
  float *queries, *d_outputs;                                   /* panels, upright */
  float *query_rows, *d_output_rows, *d_queries;                /* panels, row by row, padded */
  float *levels, *offsets, *ratios;
  sight *sights;
} room;

/* Of a query: itself and the cotangent of its output, both twice, and what is summed. */
INLINE int64_t numbers_of(const problem *p) { return 3 * up_to(p->H, PANEL) + 2 * up_to(p->E, PANEL); }

static room room_for(const problem *p) {
  const int64_t wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL);
  const int64_t panels = p->G * (block_of(p, numbers_of(p)) / PANEL), rows = panels * PANEL;
  const int64_t sizes[] = {KEYS * wide_h,  KEYS * wide_e, KEYS * PAIR,   KEYS * PAIR,   KEYS * wide_h,
                           KEYS * wide_e,  rows * p->H,   rows * p->E,   rows * wide_h, rows * wide_e,
                           rows * wide_h,  rows,          rows,          rows,
                           (int64_t)(panels * sizeof(sight) + 3) / 4};
  float *at[15];
  workspace(at, sizes, 15);
  return (room){at[0], at[1], at[2],  at[3],  at[4],  at[5],  at[6],  at[7],
                at[8], at[9], at[10], at[11], at[12], at[13], (sight *)at[14]};
}

/* ROWS by PANEL numbers of `to` += the product of a and b. They are asked for first: they lie in a second-level cache,
 * for which adding would wait. */
INLINE void add_product(float *to, int64_t width, const float *a, int row, int step, const float *b, int depth) {
  vec block[ROWS][COLUMNS];
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < COLUMNS; j++) __builtin_prefetch(to + i * width + j * LANES, 1, 3);
  product(block, depth, a, row, step, b, width);
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < COLUMNS; j++) {
      float *at = to + i * width + j * LANES;
      store(at, load(at) + block[i][j]);
    }
}

/* P and dS for a panel. */
static void change(const problem *p, const room *r, tile *t, int64_t panel, stretch keys) {
  const int64_t H = p->H, E = p->E, wide_h = up_to(H, PANEL), wide_e = up_to(E, PANEL), row = panel * PANEL;
  const int has_cap = p->caps != 0;
  const float *queries = r->queries + row * H, *d_outputs = r->d_outputs + row * E;
  float *weights = r->weights + row % PAIR, *changes = r->changes + row % PAIR;
  vec block[ROWS][COLUMNS], level[COLUMNS], offset[COLUMNS], ratios[COLUMNS] = {{0}};
  float parts[ROWS * PANEL]; /* of the cap that logits are */

  UNROLLED for (int j = 0; j < COLUMNS; j++)
    level[j] = load(r->levels + row + j * LANES), offset[j] = load(r->offsets + row + j * LANES);
  pace(t, keys);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    ask_ahead(t);
    product(block, H, t->rows.keys + key * wide_h, wide_h, 1, queries, PANEL);
    if (has_cap) cap(p, t->b, block, parts);
    if (keys.masked) hide(p, r->sights + panel, t->b, t->start + key, block);
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++)
        store(weights + (key + i) * PAIR + j * LANES, power(block[i][j] - level[j]));
    product(block, E, t->rows.values + key * wide_e, wide_e, 1, d_outputs, PANEL);
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++) {
        int64_t at = (key + i) * PAIR + j * LANES;
        vec change = load(weights + at) * (block[i][j] + offset[j]);
        if (has_cap) {
          vec ratio = load(parts + i * PANEL + j * LANES);
          ratios[j] += change * ratio;
          change *= 1 - ratio * ratio;
        }
        store(changes + at, change);
      }
  }
  for (int j = 0; has_cap && j < COLUMNS; j++)
    store(r->ratios + row + j * LANES, load(r->ratios + row + j * LANES) + ratios[j]);
}

/* The queries of a pair, from its first panel on, that see any of as many keys as a block has rows; those between them
 * too, whose weights are there: where queries of both panels see the keys, both panels have read them. */
INLINE span rows_of_pair(const sight *s, const stretch keys[2], int64_t start, int key) {
  span rows = {PAIR, 0};
  for (int n = 0; n < 2; n++) {
    if (key < keys[n].begin || keys[n].end <= key) continue;
    const span here = rows_of_keys(s + n, start + key);
    if (here.begin == here.end) continue;
    rows.begin = least(rows.begin, n * PANEL + here.begin), rows.end = n * PANEL + here.end;
  }
  return rows;
}

/* What a pair adds to the cotangents of one operand of a tile: `to`, `width` wide, += factors^T rows. */
static void sum_for_keys(float *to, int64_t width, const float *factors, const float *rows, const sight *s,
                         const stretch keys[2], int64_t start) {
  const int begin = least(keys[0].begin, keys[1].begin), end = most(keys[0].end, keys[1].end);
  for (int key = begin; key < end; key += ROWS) {
    const span seeing = rows_of_pair(s, keys, start, key);
    if (seeing.begin >= seeing.end) continue;
    for (int64_t e = 0; e < width; e += PANEL)
      add_product(to + key * width + e, width, factors + key * PAIR + seeing.begin, PAIR, 1,
                  rows + seeing.begin * width + e, seeing.end - seeing.begin);
  }
}

/* What a tile adds to the cotangents of the queries of a panel. */
static void sum_for_queries(const problem *p, const room *r, const tile *t, int64_t panel, stretch keys) {
  const int64_t width = up_to(p->H, PANEL), row = panel * PANEL;
  for (int64_t e = 0; e < width; e += PANEL)
    for (int q = 0; q < PANEL; q += ROWS) {
      const span seen = keys_of_rows(r->sights + panel, q, t->start, keys);
      add_product(r->d_queries + (row + q) * width + e, width, r->changes + seen.begin * PAIR + row % PAIR + q, 1, PAIR,
                  t->rows.keys + seen.begin * width + e, seen.end - seen.begin);
    }
}

INLINE float dot(const float *x, const float *y, int64_t size) {
  vec total = {0};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) total += load(x + i) * load(y + i);
  float rest = 0;
  for (; i < size; i++) rest += x[i] * y[i];
  return sum(total) + rest;
}

/* The operands of a panel, and what is known of its rows; rows beyond the last have no weights. */
static void prepare(const problem *p, const room *r, int64_t panel, int64_t b, int64_t k, int64_t g, int64_t t) {
  const int64_t N = p->K * p->G, rows = least(PANEL, p->T - t), row = panel * PANEL;
  const int64_t wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL);
  const float *query = p->query + at_query(p, b, t, k, g, p->H), *output = p->output + at_query(p, b, t, k, g, p->E);
  const float *d_output = p->d_output + at_query(p, b, t, k, g, p->E);
  float *query_rows = r->query_rows + row * wide_h, *d_output_rows = r->d_output_rows + row * wide_e;
  pack_rows(query_rows, wide_h, PANEL, (operand){FLOAT32, query}, N * p->H, rows, p->H);
  pack_rows(d_output_rows, wide_e, PANEL, (operand){FLOAT32, d_output}, N * p->E, rows, p->E);
  pack_upright(r->queries + row * p->H, query_rows, wide_h, rows, p->H, LOG2E);
  pack_upright(r->d_outputs + row * p->E, d_output_rows, wide_e, rows, p->E, 1);
  memset(r->d_queries + row * wide_h, 0, PANEL * wide_h * sizeof(float));
  for (int64_t i = 0; i < PANEL; i++) {
    r->levels[row + i] = INFINITY, r->offsets[row + i] = r->ratios[row + i] = 0;
    if (i >= rows) continue;
    int64_t at = at_level(p, b, k, g, t + i);
    if (p->level[at] != -INFINITY) r->levels[row + i] = p->level[at] * LOG2E;
    r->offsets[row + i] = p->d_level[at] - dot(output + i * N * p->E, d_output_rows + i * wide_e, p->E);
  }
}

/* The cotangents of a panel's queries, and what the gradient by the cap takes of them. */
static void finish(const problem *p, const room *r, int64_t panel, int64_t b, int64_t k, int64_t g, int64_t t) {
  const float *rows = r->d_queries + panel * PANEL * up_to(p->H, PANEL);
  for (int64_t q = 0; q < least(PANEL, p->T - t); q++) {
    memcpy(p->d_query + at_query(p, b, t + q, k, g, p->H), rows + q * up_to(p->H, PANEL), p->H * sizeof(float));
    if (p->caps) p->ratios[at_level(p, b, k, g, t + q)] = r->ratios[panel * PANEL + q];
  }
}

#endif
