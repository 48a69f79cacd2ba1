/* Products of pairs: of two 16-bit numbers each, half as many operations as in float32. */
#ifndef HALVES_H
#define HALVES_H

#include "product.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define HALVES 1

/* sums + x y of both integers of each pair; exact, modulo 2^32. */
INLINE ivec add_integers(ivec sums, ivec x, ivec y) {
  return (ivec)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)x, (__m512i)y);
}

/* sums + x y of both bfloat16 of each pair, each addition rounded to float32, where subnormal numbers count as 0. */
INLINE vec add_bfloat16(vec sums, ivec x, ivec y) {
  return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)y);
}

/* Pairs of x and y, rounded to the nearest bfloat16; x in the lower halves. */
INLINE ivec pairs_of(vec x, vec y) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (ivec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
}

INLINE ivec load_pairs(const int32_t *from) { return load_integers(from); }
INLINE void store_pairs(int32_t *to, ivec x) { *(loose_ivec *)to = x; }

/* As `product`, of pairs of integers and of bfloat16. */
#define PRODUCT_OF_PAIRS(name, type, sum)                                                                          \
  INLINE void name(type block[ROWS][COLUMNS], int depth, const int32_t *a, int row, int step, const int32_t *b,    \
                   int width) {                                                                                    \
    UNROLLED for (int i = 0; i < ROWS; i++)                                                                        \
      UNROLLED for (int j = 0; j < COLUMNS; j++) block[i][j] = (type){0};                                          \
    for (int k = 0; k < depth; k++, a += step, b += width) {                                                       \
      ivec right[COLUMNS];                                                                                         \
      UNROLLED for (int j = 0; j < COLUMNS; j++) right[j] = load_pairs(b + j * LANES);                             \
      UNROLLED for (int i = 0; i < ROWS; i++) {                                                                    \
        ivec left = a[i * row] - (ivec){0};                                                                        \
        UNROLLED for (int j = 0; j < COLUMNS; j++) block[i][j] = sum(block[i][j], left, right[j]);                 \
      }                                                                                                            \
    }                                                                                                              \
  }
PRODUCT_OF_PAIRS(product_of_integers, ivec, add_integers)
PRODUCT_OF_PAIRS(product_of_bfloat16, vec, add_bfloat16)

#else
#define HALVES 0
#endif

#endif
