/* Copies of operands in the order in which they are read, and the room for them. */
#ifndef PACK_H
#define PACK_H

#include "operand.h"
#include "sight.h"

#define LINE 64 /* bytes of a cache */

/* `rows` rows of `size` numbers, `stride` apart, one behind the other with zeros up to `width`; zeros up to `all`. */
INLINE void pack_rows(float *to, int64_t width, int64_t all, operand from, int64_t stride, int64_t rows, int64_t size) {
  for (int64_t r = 0; r < rows; r++) {
    widen(to + r * width, beyond(from, r * stride), size);
    memset(to + r * width + size, 0, (width - size) * sizeof(float));
  }
  if (rows < all) memset(to + rows * width, 0, (all - rows) * width * sizeof(float));
}

/* Asks for a row that will be packed, for the second-level cache: far apart in memory, rows are not foreseen. */
INLINE void ask(operand row, int64_t size) {
  for (int64_t i = 0; i < size * size_of(row); i += LINE) __builtin_prefetch((const char *)row.data + i, 0, 2);
}

/* A tile of keys or values of which rows [first, first + count) are read, and all others in [0, KEYS) are zero. */
INLINE void pack_tile(float *to, int64_t width, operand from, int64_t stride, int64_t first, int64_t count,
                      int64_t size) {
  memset(to, 0, first * width * sizeof(float));
  pack_rows(to + first * width, width, KEYS - first, from, stride, count, size);
}

/* to[:count] += from[:count]; count is a multiple of LANES. */
INLINE void add(float *to, const float *from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(to + i, load(to + i) + load(from + i));
}

/* A panel upright: `size` rows of PANEL numbers, one of each of the `rows` rows, times `factor`; zeros for the rest. */
INLINE void pack_upright(float *to, const float *from, int64_t stride, int64_t rows, int64_t size, float factor) {
  typedef float quad __attribute__((vector_size(16)));
  typedef float loose_quad __attribute__((vector_size(16), aligned(4), may_alias));
  const int64_t whole = rows / 4 * 4;
  if (rows < PANEL) memset(to, 0, size * PANEL * sizeof(float));
  for (int64_t i = 0; i < size; i++) {
    const float *at = from + i;
    for (int64_t r = 0; r < whole; r += 4, at += 4 * stride)
      *(loose_quad *)(to + i * PANEL + r) = factor * (quad){at[0], at[stride], at[2 * stride], at[3 * stride]};
    for (int64_t r = whole; r < rows; r++) to[i * PANEL + r] = factor * from[r * stride + i];
  }
}

/* A tile of keys from `start` on, of those below `end`, and how many panels pass over it. */
typedef struct {
  int64_t b, k, start, end, panels;
} tile;

/* Asks for the part of the next tile that falls to the block of keys from `key` on of a panel's pass over this one. */
INLINE void ask_ahead(const problem *p, const tile *t, int64_t panel, int64_t key) {
  for (int64_t i = panel; i < ROWS && t->start + KEYS + key + i < t->end; i += t->panels) {
    int64_t s = t->start + KEYS + key + i;
    ask(beyond(p->key, at_key(p, t->b, s, t->k, p->H)), p->H);
    ask(beyond(p->value, at_key(p, t->b, s, t->k, p->E)), p->E);
  }
}

/* A block of queries, from `from` on, of a key head; none where there is no such batch. */
typedef struct {
  int64_t b, k, from;
} place;

/* Asks for what a thread's next block begins with: the rows of its panel i, and as many of its first tile. */
INLINE void ask_for(const problem *p, place next, int64_t columns, int64_t i) {
  if (next.b >= p->B) return;
  const int64_t t = next.from + i % columns * PANEL, s = p->first[next.b * p->T + next.from] / KEYS * KEYS + i * PANEL;
  for (int64_t n = 0; n < PANEL && t + n < p->T; n++) {
    if (p->query) ask((operand){FLOAT32, p->query + at_query(p, next.b, t + n, next.k, i / columns, p->H)}, p->H);
    if (!p->d_output) continue;
    ask((operand){FLOAT32, p->output + at_query(p, next.b, t + n, next.k, i / columns, p->E)}, p->E);
    ask((operand){FLOAT32, p->d_output + at_query(p, next.b, t + n, next.k, i / columns, p->E)}, p->E);
  }
  for (int64_t n = 0; n < PANEL && i * PANEL < KEYS && s + n < p->S; n++) {
    ask(beyond(p->key, at_key(p, next.b, s + n, next.k, p->H)), p->H);
    ask(beyond(p->value, at_key(p, next.b, s + n, next.k, p->E)), p->E);
  }
}

#endif
