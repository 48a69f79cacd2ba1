/* The soft cap: c tanh(l / c) in place of a logit l, in powers of two. */
#ifndef CAP_H
#define CAP_H

#include <float.h>

#include "problem.h"

/* 2^y - 1 for y <= 0, by the polynomial of `power`, whose first coefficient is 1: exact to a few units of roundoff of the
 * difference, however near 0 y is. docs/bounds.md counts them. */
INLINE vec power_less_1(vec y) {
  const powers p = powers_of(y);
  vec scale = (vec)((p.n + 127) << 23); /* 2^n, and 0 for n = -127 */
  return scale * (p.slope * p.f) + (scale - 1);
}

/* tanh(y ln(2) / 2) = (1 - 2^-y) / (1 + 2^-y), with the sign of y. */
INLINE vec tangent(vec y) {
  const ivec sign = (ivec)y & INT32_MIN;
  vec less = power_less_1((vec)((ivec)y | INT32_MIN));
  return (vec)((ivec)(-less / (2 + less)) | sign);
}

/* What the cap makes of logits; the hyperbolic tangents are the ratios to the cap. */
INLINE vec ratio_of(float cap, vec logit) { return tangent(logit * fminf(2 / cap, FLT_MAX)); }
INLINE vec capped(float cap, vec ratio) { return ratio * (cap * LOG2E); }

/* Where logits have no cap, they must not lie in memory: this is no part of the loop that makes them. */
APART void cap_in_memory(const problem *p, int64_t b, vec logits[ROWS][COLUMNS], float *ratios) {
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < COLUMNS; j++) {
      vec ratio = ratio_of(p->caps[b], logits[i][j]);
      if (ratios) store(ratios + i * PANEL + j * LANES, ratio);
      logits[i][j] = capped(p->caps[b], ratio);
    }
}

/* The logits of a block capped; their ratios to the cap are kept where `ratios` is given. */
INLINE void cap(const problem *p, int64_t b, vec logits[ROWS][COLUMNS], float *ratios) {
  vec room[ROWS][COLUMNS];
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < COLUMNS; j++) room[i][j] = logits[i][j];
  cap_in_memory(p, b, room, ratios);
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < COLUMNS; j++) logits[i][j] = room[i][j];
}

#endif
