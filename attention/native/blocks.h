/* A forward pass: a block of queries of all heads that share a key head passes over the tiles of keys that it reads. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "ask.h"

/* What the panels of a block have found: sums of weighted values and of weights, relative to levels. */
typedef struct {
  float *outputs, *levels, *sums;
  sight *sights;
} sofar;

/* Of a query: itself and its output. */
INLINE int64_t numbers_of(const problem *p) { return p->H + p->E; }

INLINE int64_t panels_of(const problem *p) { return p->G * (block_of(p, numbers_of(p)) / PANEL); }

/* The last blocks first: where causality shortens the others, the short ones fill up the end. */
INLINE place place_of(const problem *p, int64_t n) {
  const int64_t blocks = blocks_of(p, numbers_of(p)), heads = p->B * p->K;
  if (n >= heads * blocks) return (place){p->B};
  return (place){n % heads / p->K, n % p->K, (blocks - 1 - n / heads) * block_of(p, numbers_of(p))};
}

/* A block of the outputs of a panel += what a tile adds. */
INLINE void add_block(float *to, int64_t width, vec block[ROWS][COLUMNS]) {
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < COLUMNS; j++) {
      float *at = to + i * width + j * LANES;
      store(at, load(at) + block[i][j]);
    }
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
  void (*keys)(const problem *p, const void *room, tile *t, place at, int64_t first, int64_t count);
  void (*step)(const problem *p, const void *room, tile *t, int64_t panel, stretch keys);
} passing;

/* The queries of a panel, and nothing summed yet. */
INLINE void prepare(const problem *p, const sofar *f, const void *room, passing way, place at, int64_t g, int64_t panel) {
  const int64_t size = PANEL * up_to(p->E, PANEL);
  way.queries(p, room, at, g, panel);
  memset(f->outputs + panel * size, 0, size * sizeof(float));
  for (int64_t i = 0; i < PANEL; i++) f->levels[panel * PANEL + i] = -INFINITY, f->sums[panel * PANEL + i] = 0;
}

INLINE void pass(const problem *p, place at, place next, const sofar *f, const void *room, passing way) {
  const int64_t b = at.b, k = at.k;
  const int64_t columns = (least(block_of(p, numbers_of(p)), p->T - at.from) + PANEL - 1) / PANEL, panels = p->G * columns;
  int64_t begin = p->S, end = 0;
  for (int64_t i = 0; i < panels; i++) {
    f->sights[i] = sight_of(p, b, k, i / columns, at.from + i % columns * PANEL);
    begin = least(begin, f->sights[i].begin), end = most(end, f->sights[i].end);
  }
  for (int64_t start = begin / KEYS * KEYS; start < end; start += KEYS) {
    const int64_t first = most(start, begin), count = least(end, start + KEYS) - first;
    tile here = {.b = b, .start = start, .panels = panels, .left = panels};
    int32_t range[2];
    int packed = 0;
    segment_range(p, b, start, range);
    want_next(&here, p, k, end, next);
    for (int64_t i = 0; i < panels; i++, here.left--) {
      const int64_t g = i / columns, t = at.from + i % columns * PANEL, after = i + 1;
      const int ends = ends_in(f->sights + i, start);
      if (first == begin) {
        prepare(p, f, room, way, (place){b, k, t}, g, i);
        if (after < panels) want_queries(&here.soon, p, b, k, after / columns, at.from + after % columns * PANEL);
      }
      if (ends) want_panel(&here.soon, p, p->output, p->E, b, k, g, t, 1);
      stretch keys = stretch_of(p, f->sights + i, start, range);
      while (keys.begin < keys.end) {
        const stretch run = run_of(p, f->sights + i, b, start, keys);
        keys.begin = run.end;
        if (run.begin == run.end) continue;
        if (!packed) way.keys(p, room, &here, at, first, count);
        packed = 1;
        way.step(p, room, &here, i, run);
      }
      if (ends) finish(p, f, i, b, k, g, t);
    }
  }
  for (int64_t i = 0; i < panels; i++) { /* those that see no key */
    if (f->sights[i].end > 0) continue;
    const place rows = {b, k, at.from + i % columns * PANEL};
    prepare(p, f, room, way, rows, i / columns, i);
    finish(p, f, i, b, k, i / columns, rows.from);
  }
}

#endif
