/* Copies of operands in the order in which they are read, and the room for them. */
#ifndef PACK_H
#define PACK_H

#include "operand.h"
#include "sight.h"

/* `rows` rows of `size` numbers, `stride` apart, one behind the other with zeros up to `width`; zeros up to `all`. */
INLINE void pack_rows(float *to, int64_t width, int64_t all, operand from, int64_t stride, int64_t rows, int64_t size) {
  for (int64_t r = 0; r < rows; r++) {
    widen(to + r * width, beyond(from, r * stride), size);
    if (size < width) memset(to + r * width + size, 0, (width - size) * sizeof(float));
  }
  if (rows < all) memset(to + rows * width, 0, (all - rows) * width * sizeof(float));
}

/* A tile of keys or values of which rows [first, first + count) are read, and all others in [0, KEYS) are zero. */
INLINE void pack_tile(float *to, int64_t width, operand from, int64_t stride, int64_t first, int64_t count,
                      int64_t size) {
  if (first) memset(to, 0, first * width * sizeof(float));
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

#endif
