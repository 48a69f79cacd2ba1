/* Rows asked of memory before they are read or written, a few with each block of keys: far apart they are not foreseen,
 * and all at once they would be waited for. */
#ifndef ASK_H
#define ASK_H

#include "tiles.h"

#define LINE 64 /* bytes of a cache */
#define STRIPS 8

/* Rows still to be asked for, in strips of rows `step` bytes apart; the strip put in last comes first. */
typedef struct {
  struct {
    const char *at;
    int64_t bytes, step, rows;
    int written;
  } strips[STRIPS];
  int count;
  int64_t rows, each; /* of all strips; at a time */
} wanted;

/* A tile of keys from `start` on, its rows as they are packed, the panels that pass over it and those still to do so, this
 * one too, and what is asked for meanwhile: by the end of this panel's pass, and of the last one's, but not in the first
 * half of them, or it would be evicted before it is read. */
typedef struct {
  int64_t b, start, panels, left;
  packed_rows rows;
  wanted soon, later;
} tile;

/* `rows` rows of `size` numbers, `stride` apart, from the nth number on, as long as there is room for a strip. */
INLINE void want(wanted *w, operand from, int64_t n, int64_t stride, int64_t rows, int64_t size, int written) {
  if (rows <= 0 || w->count == STRIPS) return;
  const int64_t unit = size_of(from);
  w->strips[w->count].at = beyond(from, n).data, w->strips[w->count].written = written;
  w->strips[w->count].bytes = size * unit, w->strips[w->count].step = stride * unit, w->strips[w->count].rows = rows;
  w->count++, w->rows += rows;
}

INLINE void ask(wanted *w) {
  for (int64_t n = 0; n < w->each && w->count; n++, w->rows--) {
    const int last = w->count - 1;
    const char *at = w->strips[last].at;
    for (int64_t i = 0; i < w->strips[last].bytes; i += LINE) /* for all caches: hints for the second alone get lost */
      if (w->strips[last].written) __builtin_prefetch(at + i, 1, 3);
      else __builtin_prefetch(at + i, 0, 3);
    w->strips[last].at = at + w->strips[last].step;
    if (--w->strips[last].rows == 0) w->count--;
  }
}

/* Spreads what is wanted over the blocks of a panel's pass, and of those that follow if they are as long. */
INLINE void pace(tile *t, stretch keys) {
  const int64_t blocks = (keys.end - keys.begin) / ROWS;
  t->soon.each = (t->soon.rows + blocks - 1) / blocks;
  t->later.each = 2 * t->left > t->panels + 1 ? 0 : (t->later.rows + blocks * t->left - 1) / (blocks * t->left);
}

INLINE void ask_ahead(tile *t) { ask(&t->soon), ask(&t->later); }

/* Rows of the operands or results of the queries of a panel, from `t` on. */
INLINE void want_panel(wanted *w, const problem *p, const float *x, int64_t size, int64_t b, int64_t k, int64_t g,
                       int64_t t, int written) {
  const int64_t at = at_query(p, b, t, k, g, size);
  want(w, (operand){FLOAT32, x}, at, p->K * p->G * size, least(PANEL, p->T - t), size, written);
}

/* All operands of a panel. */
INLINE void want_queries(wanted *w, const problem *p, int64_t b, int64_t k, int64_t g, int64_t t) {
  if (p->query) want_panel(w, p, p->query, p->H, b, k, g, t, 0);
  if (!p->d_output) return;
  want_panel(w, p, p->output, p->E, b, k, g, t, 0);
  want_panel(w, p, p->d_output, p->E, b, k, g, t, 0);
}

/* Keys and values of a tile, or their cotangents, as they lie in memory. */
INLINE void want_keys(wanted *w, const problem *p, operand keys, operand values, int64_t b, int64_t k, int64_t start,
                      int written) {
  const int64_t rows = least(KEYS, p->S - start);
  want(w, keys, at_key(p, b, start, k, p->H), p->K * p->H, rows, p->H, written);
  want(w, values, at_key(p, b, start, k, p->E), p->K * p->E, rows, p->E, written);
}

/* A tile that will be read: as it is packed, or else what is to be packed. */
INLINE void want_tile(wanted *w, const problem *p, int64_t b, int64_t k, int64_t start) {
  enum { ROW = 4 * LINE / sizeof(float) };
  if (is_shared(p, start)) want(w, (operand){FLOAT32, shared_tile(p, b, k, start)}, 0, ROW, tile_size(p) / ROW, ROW, 0);
  else want_keys(w, p, p->key, p->value, b, k, start, 0);
}

/* A block of queries, from `from` on, of a key head; none where there is no such batch. */
typedef struct {
  int64_t b, k, from;
} place;

/* The tile after this one, or else the first tile and the first panel of a thread's next block. */
INLINE void want_next(tile *t, const problem *p, int64_t k, int64_t end, place next) {
  if (t->start + KEYS < end) {
    want_tile(&t->later, p, t->b, k, t->start + KEYS);
  } else if (next.b < p->B) {
    const int64_t start = p->first[next.b * p->T + next.from] / KEYS * KEYS;
    want_tile(&t->later, p, next.b, next.k, start);
    want_queries(&t->later, p, next.b, next.k, 0, next.from);
  }
}

#endif
