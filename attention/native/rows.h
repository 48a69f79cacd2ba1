/* One query and a few keys or values, as they lie in memory. */
#ifndef ROWS_H
#define ROWS_H

#include "operand.h"

#define TOKENS 4 /* that are read together; KEYS is a multiple of it */

/* to[n] = x . (row n of y) for TOKENS rows, `stride` apart; memory is asked for what lies `ahead` of them, for the
 * second-level cache, which can wait for more lines at once than the first. */
INLINE void dots(float *to, const float *x, operand y, int64_t stride, int64_t size, int64_t ahead) {
  vec total[TOKENS] = {{0}};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    vec here = load(x + i);
    for (int n = 0; n < TOKENS; n++) {
      __builtin_prefetch(beyond(y, ahead + n * stride + i).data, 0, 2);
      total[n] += here * load_as_float32(y, n * stride + i);
    }
  }
  if (i < size) {
    vec here = load_few((operand){FLOAT32, x}, i, size - i);
    for (int n = 0; n < TOKENS; n++) total[n] += here * load_few(y, n * stride + i, size - i);
  }
  for (int n = 0; n < TOKENS; n++) to[n] = sum(total[n]);
}

/* to += the sum of factors[n] (row n of x) over TOKENS rows, `stride` apart, in their order. */
INLINE void add_rows(float *to, const float *factors, operand x, int64_t stride, int64_t size, int64_t ahead) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    vec total = load(to + i);
    for (int n = 0; n < TOKENS; n++) {
      __builtin_prefetch(beyond(x, ahead + n * stride + i).data, 0, 2);
      total += factors[n] * load_as_float32(x, n * stride + i);
    }
    store(to + i, total);
  }
  if (i == size) return;
  vec total = load_few((operand){FLOAT32, to}, i, size - i);
  for (int n = 0; n < TOKENS; n++) total += factors[n] * load_few(x, n * stride + i, size - i);
  store_few(to + i, total, size - i);
}

/* Logits become weights relative to their maximum and `top`, which grows to it; returns their sum, and in `kept` by what
 * earlier sums are to be multiplied. `count` is a multiple of LANES. */
INLINE float weights_of(float *logits, int64_t count, float *top, float *kept) {
  vec largest = fill(-INFINITY), total = {0};
  for (int64_t i = 0; i < count; i += LANES) largest = larger(load(logits + i), largest);
  const float before = *top;
  for (int i = 0; i < LANES; i++) *top = largest[i] > *top ? largest[i] : *top;
  const float shift = *top == -INFINITY ? 0 : *top;
  *kept = power(fill(before - shift))[0];
  for (int64_t i = 0; i < count; i += LANES) {
    vec weight = power(load(logits + i) - shift);
    total += weight;
    store(logits + i, weight);
  }
  return sum(total);
}

#endif
