/* The cotangents of query, key and value, for a block of queries at a time.
 *
 * With P = e^(logits - level), c = d level - rowsum(dO O) and dS = P (dO V^T + c):
 *
 *     dV = P^T dO,    dK = dS^T Q,    dQ = dS K.
 *
 * A cap multiplies dS by 1 - r^2, where r is the ratio of the capped logit to it.
 *
 * P and dS stand upright, keys by queries, so that all five products have one form. Blocks of queries are dealt out to
 * `parts`, each of which sums its own dK and dV, and these sums are added in their order: the bits do not depend on how
 * many threads there are.
 */
#include "cap.h"
#include "forward.h"
#include "pack.h"
#include "pool.h"
#include "sight.h"

typedef struct {
  float *keys, *values, *weights, *changes, *d_keys, *d_values; /* of a tile of keys */
  float *queries, *d_outputs;                                   /* panels, upright */
  float *query_rows, *d_output_rows, *d_queries;                /* panels, row by row, padded */
  float *levels, *offsets, *ratios;
  sight *sights;
} room;

static room room_for(const problem *p) {
  const int64_t wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL);
  const int64_t panels = p->G * (block_of(p, QUERIES) / PANEL), rows = panels * PANEL;
  const int64_t sizes[] = {KEYS * wide_h,  KEYS * wide_e, KEYS * PANEL,  KEYS * PANEL,  KEYS * wide_h,
                           KEYS * wide_e,  rows * p->H,   rows * p->E,   rows * wide_h, rows * wide_e,
                           rows * wide_h,  rows,          rows,          rows,
                           (int64_t)(panels * sizeof(sight) + 3) / 4};
  float *at[15];
  workspace(at, sizes, 15);
  return (room){at[0], at[1], at[2],  at[3],  at[4],  at[5],  at[6],  at[7],
                at[8], at[9], at[10], at[11], at[12], at[13], (sight *)at[14]};
}

/* ROWS rows of `to` += the product of a and b, which is `depth` by `width`. */
INLINE void add_product(float *to, int64_t width, const float *a, int row, int step, const float *b, int depth) {
  vec block[ROWS][COLUMNS];
  for (int64_t e = 0; e < width; e += PANEL) {
    product(block, depth, a, row, step, b + e, width);
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++) {
        float *at = to + i * width + e + j * LANES;
        store(at, load(at) + block[i][j]);
      }
  }
}

/* One tile of keys for one panel of queries: P, dS, and what they add to the three cotangents. */
static void step(const problem *p, const room *r, const tile *t, int64_t panel, stretch keys, float *d_keys,
                 float *d_values) {
  const int64_t H = p->H, E = p->E, wide_h = up_to(H, PANEL), wide_e = up_to(E, PANEL), row = panel * PANEL;
  const int has_cap = p->caps != 0;
  const float *queries = r->queries + row * H, *d_outputs = r->d_outputs + row * E;
  const sight *s = r->sights + panel;
  vec block[ROWS][COLUMNS], level[COLUMNS], offset[COLUMNS], ratios[COLUMNS] = {{0}};

  UNROLLED for (int j = 0; j < COLUMNS; j++)
    level[j] = load(r->levels + row + j * LANES), offset[j] = load(r->offsets + row + j * LANES);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    ask_ahead(p, t, panel, key);
    product(block, H, r->keys + key * wide_h, wide_h, 1, queries, PANEL);
    if (has_cap) cap(p, t->b, block, r->changes + key * PANEL);
    if (keys.masked) hide(p, s, t->b, t->start + key, block);
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++)
        store(r->weights + (key + i) * PANEL + j * LANES, power(block[i][j] - level[j]));
    product(block, E, r->values + key * wide_e, wide_e, 1, d_outputs, PANEL);
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++) {
        int64_t at = (key + i) * PANEL + j * LANES;
        vec change = load(r->weights + at) * (block[i][j] + offset[j]);
        if (has_cap) {
          vec ratio = load(r->changes + at);
          ratios[j] += change * ratio;
          change *= 1 - ratio * ratio;
        }
        store(r->changes + at, change);
      }
  }
  for (int j = 0; has_cap && j < COLUMNS; j++)
    store(r->ratios + row + j * LANES, load(r->ratios + row + j * LANES) + ratios[j]);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    const span seeing = rows_of_keys(s, t->start + key);
    const int from = seeing.begin, depth = seeing.end - from;
    add_product(d_values + key * wide_e, wide_e, r->weights + key * PANEL + from, PANEL, 1,
                r->d_output_rows + (row + from) * wide_e, depth);
    add_product(d_keys + key * wide_h, wide_h, r->changes + key * PANEL + from, PANEL, 1,
                r->query_rows + (row + from) * wide_h, depth);
  }
  for (int q = 0; q < PANEL; q += ROWS) {
    const span seen = keys_of_rows(s, q, t->start, keys);
    add_product(r->d_queries + (row + q) * wide_h, wide_h, r->changes + seen.begin * PANEL + q, 1, PANEL,
                r->keys + seen.begin * wide_h, seen.end - seen.begin);
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
  r->sights[panel] = sight_of(p, b, k, g, t);
  pack_upright(r->queries + row * p->H, query, N * p->H, rows, p->H, LOG2E);
  pack_upright(r->d_outputs + row * p->E, d_output, N * p->E, rows, p->E, 1);
  pack_rows(r->query_rows + row * wide_h, wide_h, PANEL, (operand){FLOAT32, query}, N * p->H, rows, p->H);
  pack_rows(r->d_output_rows + row * wide_e, wide_e, PANEL, (operand){FLOAT32, d_output}, N * p->E, rows, p->E);
  for (int64_t i = 0; i < PANEL; i++) {
    r->levels[row + i] = INFINITY, r->offsets[row + i] = r->ratios[row + i] = 0;
    if (i >= rows) continue;
    int64_t at = at_level(p, b, k, g, t + i);
    if (p->level[at] != -INFINITY) r->levels[row + i] = p->level[at] * LOG2E;
    r->offsets[row + i] = p->d_level[at] - dot(output + i * N * p->E, d_output + i * N * p->E, p->E);
  }
}

/* A block of queries: dQ whole, dK and dV added to the sums of a part. */
static void block_of_queries(const problem *p, const room *r, place at, place next, float *sums) {
  const int64_t b = at.b, k = at.k, from = at.from, wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL);
  const int64_t columns = (least(block_of(p, QUERIES), p->T - from) + PANEL - 1) / PANEL, panels = p->G * columns;
  int64_t begin = p->S, end = 0;
  for (int64_t i = 0; i < panels; i++) {
    prepare(p, r, i, b, k, i / columns, from + i % columns * PANEL);
    begin = least(begin, r->sights[i].begin), end = most(end, r->sights[i].end);
  }
  memset(r->d_queries, 0, panels * PANEL * wide_h * sizeof(float));
  for (int64_t start = begin / KEYS * KEYS; start < end; start += KEYS) {
    int64_t first = most(start, begin), count = least(end, start + KEYS) - first, rows = least(KEYS, p->S - start);
    const tile here = {b, k, start, end, panels};
    int32_t range[2];
    segment_range(p, b, start, range);
    pack_tile(r->keys, wide_h, beyond(p->key, at_key(p, b, first, k, p->H)), p->K * p->H, first - start, count, p->H);
    pack_tile(r->values, wide_e, beyond(p->value, at_key(p, b, first, k, p->E)), p->K * p->E, first - start, count, p->E);
    float *d_keys = sums + start * wide_h, *d_values = sums + p->S * wide_h + start * wide_e;
    if (rows < KEYS) { /* a tile that is not whole has rows beyond the sums */
      d_keys = memset(r->d_keys, 0, KEYS * wide_h * sizeof(float));
      d_values = memset(r->d_values, 0, KEYS * wide_e * sizeof(float));
    }
    for (int64_t i = 0; i < panels; i++) {
      if (start + KEYS >= end) ask_for(p, next, columns, i);
      stretch keys = stretch_of(p, r->sights + i, start, range);
      if (keys.begin < keys.end) step(p, r, &here, i, keys, d_keys, d_values);
    }
    if (rows == KEYS) continue;
    add(sums + start * wide_h, d_keys, rows * wide_h);
    add(sums + p->S * wide_h + start * wide_e, d_values, rows * wide_e);
  }
  for (int64_t i = 0; i < panels; i++)
    for (int64_t t = from + i % columns * PANEL, q = 0; q < least(PANEL, p->T - t); q++) {
      memcpy(p->d_query + at_query(p, b, t + q, k, i / columns, p->H), r->d_queries + (i * PANEL + q) * wide_h,
             p->H * sizeof(float));
      if (p->caps) p->ratios[at_level(p, b, k, i / columns, t + q)] = r->ratios[i * PANEL + q];
    }
}

/* The sums of all parts of one key head, as the caller lays them out. */
static void gather(const void *context, int64_t head) {
  const problem *p = context;
  const int64_t wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL), size = p->S * (wide_h + wide_e);
  const int64_t b = head / p->K, k = head % p->K;
  float *sums = p->partial + head * p->parts * size;
  for (int64_t n = 1; n < p->parts; n++) add(sums, sums + n * size, size);
  for (int64_t s = 0; s < p->S; s++) {
    memcpy(p->d_key + at_key(p, b, s, k, p->H), sums + s * wide_h, p->H * sizeof(float));
    memcpy(p->d_value + at_key(p, b, s, k, p->E), sums + p->S * wide_h + s * wide_e, p->E * sizeof(float));
  }
}

/* Part n % parts of one key head: every `parts`th block of queries, the last ones first. */
static void part(const void *context, int64_t n) {
  const problem *p = context;
  const room r = room_for(p);
  const int64_t rows = block_of(p, QUERIES), last = blocks_of(p, QUERIES) - 1, later = n + p->threads;
  const int64_t head = n / p->parts, b = head / p->K, k = head % p->K;
  const int64_t size = p->S * (up_to(p->H, PANEL) + up_to(p->E, PANEL));
  float *sums = p->partial + n * size;
  memset(sums, 0, size * sizeof(float));
  for (int64_t block = last - n % p->parts; block >= 0; block -= p->parts) {
    place next = {b, k, (block - p->parts) * rows};
    if (block < p->parts)
      next = (place){later / p->parts / p->K, later / p->parts % p->K, most(last - later % p->parts, 0) * rows};
    block_of_queries(p, &r, (place){b, k, block * rows}, next, sums);
  }
  if (p->parts == 1) gather(p, head); /* while they are at hand */
}

void backward(const problem *given, const threads *pool) {
  problem p = *given;
  p.threads = pool_size(pool);
  share(pool, p.B * p.K * p.parts, part, &p);
  if (p.parts > 1) share(pool, p.B * p.K, gather, &p);
}
