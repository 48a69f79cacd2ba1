/* Copies of operands in the order in which they are read, and the room for them. */
#ifndef PACK_H
#define PACK_H

#include "operand.h"
#include "sight.h"

/* `rows` rows of `size` numbers, `stride` apart, one behind the other with zeros up to `width`; zeros up to `all`. */
INLINE void pack_rows(float *to, int64_t width, int64_t all, operand from, int64_t stride, int64_t rows, int64_t size) {
  for (int64_t r = 0; r < rows; r++) {
    widen(to + r * width, beyond(from, r * stride), size);
    memset(to + r * width + size, 0, (width - size) * sizeof(float));
  }
  if (rows < all) memset(to + rows * width, 0, (all - rows) * width * sizeof(float));
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
  if (rows < PANEL) memset(to, 0, size * PANEL * sizeof(float));
  for (int64_t h = 0; h < size; h += LANES)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = h; i < least(h + LANES, size); i++) to[i * PANEL + r] = factor * from[r * stride + i];
}

#endif
