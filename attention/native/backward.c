/* The cotangents of query, key and value, for a block of queries at a time.
 *
 * With P = e^(logits - level), c = d level - rowsum(dO O) and dS = P (dO V^T + c):
 *
 *     dV = P^T dO,    dK = dS^T Q,    dQ = dS K.
 *
 * A cap multiplies dS by 1 - r^2, where r is the ratio of the capped logit to it.
 *
 * Blocks of queries are dealt out to `parts`, each of which sums its own dK and dV, and these sums are added in their
 * order: the bits do not depend on how many threads there are. A part that is one block has a tile's sums when the tile
 * has passed, and keeps no others.
 */
#include "cotangents.h"
#include "forward.h"

/* The cotangents of `rows` keys and values from `start` on. */
static void deliver(const problem *p, int64_t b, int64_t k, int64_t start, int64_t rows, const float *d_keys,
                    const float *d_values) {
  for (int64_t s = 0; s < rows; s++) {
    memcpy(p->d_key + at_key(p, b, start + s, k, p->H), d_keys + s * up_to(p->H, PANEL), p->H * sizeof(float));
    memcpy(p->d_value + at_key(p, b, start + s, k, p->E), d_values + s * up_to(p->E, PANEL), p->E * sizeof(float));
  }
}

/* Those of keys in [start, end), which no query sees. */
static void deliver_zeros(const problem *p, int64_t b, int64_t k, int64_t start, int64_t end) {
  for (int64_t s = start; s < end; s++) {
    memset(p->d_key + at_key(p, b, s, k, p->H), 0, p->H * sizeof(float));
    memset(p->d_value + at_key(p, b, s, k, p->E), 0, p->E * sizeof(float));
  }
}

/* A block of queries: its panels, `columns` of each head, and the keys that any of them sees. */
typedef struct {
  int64_t b, k, from, columns, panels, begin, end;
} block;

/* A panel of it. */
typedef struct {
  int64_t g, t;
} spot;

INLINE spot spot_of(const block *x, int64_t panel) {
  return (spot){panel / x->columns, x->from + panel % x->columns * PANEL};
}

static block block_at(const problem *p, const room *r, place at) {
  block x = {.b = at.b, .k = at.k, .from = at.from, .begin = p->S};
  x.columns = (least(block_of(p, numbers_of(p)), p->T - at.from) + PANEL - 1) / PANEL, x.panels = p->G * x.columns;
  for (int64_t i = 0; i < x.panels; i++) {
    const spot here = spot_of(&x, i);
    r->sights[i] = sight_of(p, x.b, x.k, here.g, here.t);
    x.begin = least(x.begin, r->sights[i].begin), x.end = most(x.end, r->sights[i].end);
  }
  return x;
}

/* P and dS of a tile for a panel, which is made ready in the first tile; the keys it sees are returned. */
static stretch see(const problem *p, const room *r, const block *x, tile *t, int64_t panel, const int32_t range[2]) {
  const spot here = spot_of(x, panel), next = spot_of(x, panel + 1);
  const stretch keys = stretch_of(p, r->sights + panel, t->start, range);
  if (t->start == x->begin / KEYS * KEYS) {
    prepare(p, r, panel, x->b, x->k, here.g, here.t);
    if (panel + 1 < x->panels) want_queries(&t->soon, p, x->b, x->k, next.g, next.t);
  }
  if (ends_in(r->sights + panel, t->start)) want_panel(&t->soon, p, p->d_query, p->H, x->b, x->k, here.g, here.t, 1);
  if (keys.begin < keys.end) change(p, r, t, panel, keys);
  t->left--;
  return keys;
}

/* What the panels of a block add to the cotangents of a tile, a pair at a time, and it to theirs. */
static void pass(const problem *p, const room *r, const block *x, tile *t, float *d_keys, float *d_values) {
  const int64_t wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL);
  int32_t range[2];
  segment_range(p, x->b, t->start, range);
  for (int64_t i = 0; i < x->panels; i += 2) {
    const int64_t count = least(2, x->panels - i), row = i * PANEL;
    stretch keys[2] = {{KEYS}, {KEYS}};
    for (int64_t n = 0; n < count; n++) keys[n] = see(p, r, x, t, i + n, range);
    sum_for_keys(d_values, wide_e, r->weights, r->d_output_rows + row * wide_e, r->sights + i, keys, t->start);
    sum_for_keys(d_keys, wide_h, r->changes, r->query_rows + row * wide_h, r->sights + i, keys, t->start);
    for (int64_t n = 0; n < count; n++) {
      const spot here = spot_of(x, i + n);
      if (keys[n].begin < keys[n].end) sum_for_queries(p, r, t, i + n, keys[n]);
      if (ends_in(r->sights + i + n, t->start)) finish(p, r, i + n, x->b, x->k, here.g, here.t);
    }
  }
}

/* A tile of keys, and what the block adds to their cotangents: to the sums of a part, or all there is without sums. */
static void tile_of_keys(const problem *p, const room *r, const block *x, int64_t start, place next, float *sums) {
  const int64_t wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL), rows = least(KEYS, p->S - start);
  const int64_t first = most(start, x->begin), count = least(x->end, start + KEYS) - first;
  float *d_keys = sums + start * wide_h, *d_values = sums + p->S * wide_h + start * wide_e;
  tile t = {.b = x->b, .start = start, .panels = x->panels, .left = x->panels};
  t.rows = pack_of(p, x->b, x->k, start, first, count, r->keys, r->values);
  want_next(&t, p, x->k, x->end, next);
  if (sums && rows == KEYS) {
    pass(p, r, x, &t, d_keys, d_values);
    return;
  }
  memset(r->d_keys, 0, KEYS * wide_h * sizeof(float)); /* the sums have no room for rows beyond the last key */
  memset(r->d_values, 0, KEYS * wide_e * sizeof(float));
  if (!sums) want_keys(&t.later, p, (operand){FLOAT32, p->d_key}, (operand){FLOAT32, p->d_value}, x->b, x->k, start, 1);
  pass(p, r, x, &t, r->d_keys, r->d_values);
  if (!sums) {
    deliver(p, x->b, x->k, start, rows, r->d_keys, r->d_values);
  } else {
    add(d_keys, r->d_keys, rows * wide_h);
    add(d_values, r->d_values, rows * wide_e);
  }
}

/* A block of queries: dQ whole; dK and dV as far as it adds to them. */
static void block_of_queries(const problem *p, const room *r, place at, place next, float *sums) {
  const block x = block_at(p, r, at);
  const int64_t first = x.end ? x.begin / KEYS * KEYS : p->S;
  if (!sums) deliver_zeros(p, x.b, x.k, 0, first), deliver_zeros(p, x.b, x.k, up_to(x.end, KEYS), p->S);
  for (int64_t start = first; start < x.end; start += KEYS) tile_of_keys(p, r, &x, start, next, sums);
  for (int64_t i = 0; i < x.panels; i++) {
    if (r->sights[i].end > 0) continue; /* the others are finished */
    prepare(p, r, i, x.b, x.k, spot_of(&x, i).g, spot_of(&x, i).t);
    finish(p, r, i, x.b, x.k, spot_of(&x, i).g, spot_of(&x, i).t);
  }
}

/* The sums of all parts of one key head, as the caller lays them out. */
static void gather(const void *context, int64_t head) {
  const problem *p = context;
  const int64_t wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL), size = p->S * (wide_h + wide_e);
  float *sums = p->partial + head * p->parts * size;
  for (int64_t n = 1; n < p->parts; n++) add(sums, sums + n * size, size);
  deliver(p, head / p->K, head % p->K, 0, p->S, sums, sums + p->S * wide_h);
}

/* Part n % parts of one key head: every `parts`th block of queries, the last ones first. */
static void part(const void *context, int64_t n) {
  const problem *p = context;
  const room r = room_for(p);
  const int64_t rows = block_of(p, numbers_of(p)), last = blocks_of(p, numbers_of(p)) - 1, later = n + p->threads;
  const int64_t head = n / p->parts, b = head / p->K, k = head % p->K;
  const int64_t size = p->S * (up_to(p->H, PANEL) + up_to(p->E, PANEL));
  float *sums = last || p->parts > 1 ? p->partial + n * size : 0;
  if (sums) memset(sums, 0, size * sizeof(float));
  for (int64_t block = last - n % p->parts; block >= 0; block -= p->parts) {
    place next = {b, k, (block - p->parts) * rows};
    if (block < p->parts)
      next = (place){later / p->parts / p->K, later / p->parts % p->K, most(last - later % p->parts, 0) * rows};
    block_of_queries(p, &r, (place){b, k, block * rows}, next, sums);
  }
  if (sums && p->parts == 1) gather(p, head); /* while they are at hand */
}

void backward(const problem *given, const threads *pool) {
  problem p = *given;
  p.threads = pool_size(pool);
  pack_tiles(&p, blocks_of(&p, numbers_of(&p)), pool);
  share(pool, p.B * p.K * p.parts, part, &p);
  if (p.parts > 1) share(pool, p.B * p.K, gather, &p);
}
