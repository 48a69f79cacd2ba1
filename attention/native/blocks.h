/* A forward pass: a block of queries of all heads that share a key head passes over the tiles of keys that it reads. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "pack.h"
#include "pool.h"
#include "sight.h"

#define BLOCK (2 * QUERIES) /* a query has less than half the state that it has in a backward pass */
#define SLACK 4 /* powers of two; docs/bounds.md counts what they cost */

/* What the panels of a block have found: sums of weighted values and of weights, relative to levels. */
typedef struct {
  float *outputs, *levels, *sums;
  sight *sights;
} sofar;

INLINE int64_t panels_of(const problem *p) { return p->G * (block_of(p, BLOCK) / PANEL); }

/* The last blocks first: where causality shortens the others, the short ones fill up the end. */
INLINE place place_of(const problem *p, int64_t n) {
  const int64_t blocks = blocks_of(p, BLOCK), heads = p->B * p->K;
  if (n >= heads * blocks) return (place){p->B};
  return (place){n % heads / p->K, n % p->K, (blocks - 1 - n / heads) * block_of(p, BLOCK)};
}

/* The rows of a panel: sums of weighted values over sums of weights. */
INLINE void finish(const problem *p, const sofar *f, int64_t panel, int64_t b, int64_t k, int64_t g, int64_t t) {
  const int64_t width = up_to(p->E, PANEL);
  for (int64_t i = 0; i < least(PANEL, p->T - t); i++) {
    float sum = f->sums[panel * PANEL + i], level = f->levels[panel * PANEL + i];
    float *row = f->outputs + (panel * PANEL + i) * width, share = sum == 0 ? 0 : 1 / sum;
    for (int64_t e = 0; e < width; e += LANES) store(row + e, load(row + e) * share);
    memcpy(p->output + at_query(p, b, t + i, k, g, p->E), row, p->E * sizeof(float));
    p->level[at_level(p, b, k, g, t + i)] = sum == 0 ? -INFINITY : logf(sum) + level * LN2;
  }
}

/* What a kernel does with the queries of a panel, with keys [first, first + count) of a tile, and with both. */
typedef struct {
  void (*queries)(const problem *p, const void *room, place at, int64_t g, int64_t panel);
  void (*keys)(const problem *p, const void *room, const tile *t, int64_t first, int64_t count);
  void (*step)(const problem *p, const void *room, const tile *t, int64_t panel, stretch keys);
} passing;

INLINE void pass(const problem *p, place at, place next, const sofar *f, const void *room, passing way) {
  const int64_t size = block_of(p, BLOCK), b = at.b, k = at.k, from = at.from;
  const int64_t columns = (least(size, p->T - from) + PANEL - 1) / PANEL, panels = p->G * columns;
  int64_t begin = p->S, end = 0;
  for (int64_t i = 0; i < panels; i++) {
    const place rows = {b, k, from + i % columns * PANEL};
    f->sights[i] = sight_of(p, b, k, i / columns, rows.from);
    begin = least(begin, f->sights[i].begin), end = most(end, f->sights[i].end);
    way.queries(p, room, rows, i / columns, i);
  }
  memset(f->outputs, 0, panels * PANEL * up_to(p->E, PANEL) * sizeof(float));
  for (int64_t i = 0; i < panels * PANEL; i++) f->levels[i] = -INFINITY, f->sums[i] = 0;
  for (int64_t start = begin / KEYS * KEYS; start < end; start += KEYS) {
    const int64_t first = most(start, begin), count = least(end, start + KEYS) - first;
    const tile here = {b, k, start, end, panels};
    int32_t range[2];
    int packed = 0;
    segment_range(p, b, start, range);
    for (int64_t i = 0; i < panels; i++) {
      if (start + KEYS >= end) ask_for(p, next, columns, i);
      stretch keys = stretch_of(p, f->sights + i, start, range);
      while (keys.begin < keys.end) {
        const stretch run = run_of(p, f->sights + i, b, start, keys);
        keys.begin = run.end;
        if (run.begin == run.end) continue;
        if (!packed) way.keys(p, room, &here, first, count);
        packed = 1;
        way.step(p, room, &here, i, run);
      }
    }
  }
  for (int64_t i = 0; i < panels; i++) finish(p, f, i, b, k, i / columns, from + i % columns * PANEL);
}

#endif
