/* A block of a matrix product whose sums stay in registers. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "vectors.h"

/* Rows and vectors of a block: with the operands they fill the registers, and hide the latency of multiply-and-add. */
#if defined(__AVX512F__) || defined(__ARM_NEON)
#define ROWS 8
#else
#define ROWS 4
#endif
#define COLUMNS 2
#define PANEL (COLUMNS * LANES) /* numbers in a row of a block */

/* block[i][:] = sum over k < depth of a[i row + k step] b[k width:][:PANEL], k in order. */
INLINE void product(vec block[ROWS][COLUMNS], int depth, const float *a, int row, int step, const float *b, int width) {
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < COLUMNS; j++) block[i][j] = (vec){0};
  for (int k = 0; k < depth; k++, a += step, b += width) {
    vec right[COLUMNS];
    UNROLLED for (int j = 0; j < COLUMNS; j++) right[j] = load(b + j * LANES);
    UNROLLED for (int i = 0; i < ROWS; i++) {
      vec left = fill(a[i * row]);
      UNROLLED for (int j = 0; j < COLUMNS; j++) block[i][j] += left * right[j];
    }
  }
}

#endif
