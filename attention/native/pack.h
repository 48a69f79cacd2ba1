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

typedef float quad __attribute__((vector_size(16)));
typedef float loose_quad __attribute__((vector_size(16), aligned(4), may_alias));

/* Four numbers of each of four rows, `stride` apart, as rows of a panel that stands upright, times `factor`. */
INLINE void turn(float *to, const float *from, int64_t stride, float factor) {
  quad x[4], pairs[4];
  UNROLLED for (int i = 0; i < 4; i++) x[i] = factor * *(const loose_quad *)(from + i * stride);
  UNROLLED for (int i = 0; i < 2; i++) {
    pairs[i] = (quad){x[2 * i][0], x[2 * i + 1][0], x[2 * i][1], x[2 * i + 1][1]};
    pairs[i + 2] = (quad){x[2 * i][2], x[2 * i + 1][2], x[2 * i][3], x[2 * i + 1][3]};
  }
  UNROLLED for (int i = 0; i < 2; i++) {
    const quad left = pairs[2 * i], right = pairs[2 * i + 1];
    *(loose_quad *)(to + 2 * i * PANEL) = (quad){left[0], left[1], right[0], right[1]};
    *(loose_quad *)(to + (2 * i + 1) * PANEL) = (quad){left[2], left[3], right[2], right[3]};
  }
}

/* A panel upright: `size` rows of PANEL numbers, one of each of the `rows` rows, times `factor`; zeros for the rest. */
INLINE void pack_upright(float *to, const float *from, int64_t stride, int64_t rows, int64_t size, float factor) {
  const int64_t high = rows / 4 * 4, wide = size / 4 * 4;
  if (rows < PANEL) memset(to, 0, size * PANEL * sizeof(float));
  for (int64_t r = 0; r < high; r += 4)
    for (int64_t i = 0; i < wide; i += 4) turn(to + i * PANEL + r, from + r * stride + i, stride, factor);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = r < high ? wide : 0; i < size; i++) to[i * PANEL + r] = factor * from[r * stride + i];
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
    ask((operand){FLOAT32, p->query + at_query(p, next.b, t + n, next.k, i / columns, p->H)}, p->H);
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
