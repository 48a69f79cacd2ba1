/* One call: operands in the caller's layout, contiguous, and what each query sees. */
#ifndef PROBLEM_H
#define PROBLEM_H

#include <stddef.h>
#include <stdint.h>

#include "operand.h"
#include "product.h"

/* Booleans over b, k, g, t and s, each axis of one size with those of the operands, or of size 1 for all of it. */
typedef struct {
  const uint8_t *data;
  int64_t steps[5]; /* from one to the next along each axis; 0 where it has size 1 */
  int64_t sharing;  /* batch elements, one behind the other, that have the same */
} table;

/* query, output: B T N H and B T N E; key, value: B S K H and B S K E; N = K G, head n = k G + g.
 * Query t sees keys first[b T + t] to last[b T + t], and of these only those with its segment, unless there are none.
 * shown: of each pair of a query and a key whether it may be seen, unless there are none.
 * caps: B, of the logits of each batch element, or none.
 * pages: B K G P T, whether a query reads the keys [i page, i page + page) at all; without them it reads what it sees.
 * tiles: room for packed tiles of keys and values, B K S / KEYS, which all blocks of queries read; or none.
 * level: B N T, the log of the sum of exponentials; -inf where no key is seen.
 */
typedef struct {
  int64_t B, T, S, K, G, H, E;
  const float *query;
  operand key, value;
  const int16_t *short_query, *short_key; /* in place of both, in a halved pass: what they are times the scales is meant */
  const float *query_scale, *key_scale;   /* B T N and B S K */
  const float *caps;
  const int32_t *first, *last, *query_segments, *key_segments;
  table shown;
  const uint8_t *pages;
  int64_t P, page; /* keys of a page: a multiple of ROWS */
  float *tiles;
  float *output, *level;
  const float *d_output, *d_level; /* the cotangents, in a backward pass */
  float *d_query, *d_key, *d_value, *partial;
  float *ratios; /* B N T, in a backward pass: sums over keys of the capped logit's cotangent times its ratio to the cap */
  int64_t parts, threads; /* of dK and dV; that share the items */
} problem;

INLINE int64_t at_query(const problem *p, int64_t b, int64_t t, int64_t k, int64_t g, int64_t size) {
  return (((b * p->T + t) * p->K + k) * p->G + g) * size;
}
INLINE int64_t at_key(const problem *p, int64_t b, int64_t s, int64_t k, int64_t size) {
  return ((b * p->S + s) * p->K + k) * size;
}
INLINE int64_t at_level(const problem *p, int64_t b, int64_t k, int64_t g, int64_t t) {
  return ((b * p->K + k) * p->G + g) * p->T + t;
}
INLINE const uint8_t *page_at(const problem *p, int64_t b, int64_t k, int64_t g, int64_t page, int64_t t) {
  return p->pages + (((b * p->K + k) * p->G + g) * p->P + page) * p->T + t;
}
INLINE const uint8_t *shown_at(const problem *p, int64_t b, int64_t k, int64_t g, int64_t t, int64_t s) {
  const int64_t *step = p->shown.steps;
  return p->shown.data + b / p->shown.sharing * step[0] + k * step[1] + g * step[2] + t * step[3] + s * step[4];
}
INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
INLINE int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
INLINE int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

#define STATE (1 << 17) /* numbers that a block's queries have: half of a second-level cache */

/* Queries of a block, where each has so many numbers of state: as many as have room, since every block passes over all keys
 * that it sees. Few where G heads share them, and where there would be fewer than ITEMS items to share; no more than
 * make all blocks of one size; by the shapes alone, as the order of all sums is. */
INLINE int64_t block_of(const problem *p, int64_t numbers) {
  int64_t rows = up_to(most(STATE / numbers / p->G, 1), PANEL);
  while (rows > PANEL && p->B * p->K * ((p->T + rows - 1) / rows) < ITEMS) rows = up_to(rows / 2, PANEL);
  const int64_t blocks = (p->T + rows - 1) / rows;
  return up_to((p->T + blocks - 1) / blocks, PANEL);
}
INLINE int64_t blocks_of(const problem *p, int64_t numbers) {
  const int64_t rows = block_of(p, numbers);
  return (p->T + rows - 1) / rows;
}

#endif
