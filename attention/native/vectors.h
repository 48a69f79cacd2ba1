/* Vectors of float32 as wide as the target's registers, and 2^x on them. */
#ifndef VECTORS_H
#define VECTORS_H

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX__) || defined(__SSE__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define LOG2E 1.44269504088896340736f
#define LN2 0.69314718055994530942f
#define BYTES (4 * LANES)
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline)) /* a loop over registers: there are too few of them for what stands around it */
#define UNROLLED _Pragma("GCC unroll 16") /* a loop over registers: whole, or an array of them lies in memory */

typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ivec __attribute__((vector_size(BYTES)));
typedef float loose_vec __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t loose_ivec __attribute__((vector_size(BYTES), aligned(4), may_alias));

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec x) { *(loose_vec *)to = x; }
INLINE ivec load_integers(const int32_t *from) { return *(const loose_ivec *)from; }
INLINE vec fill(float x) { return x - (vec){0}; }

/* x where the mask is all ones, y where it is 0. */
INLINE vec pick(ivec mask, vec x, vec y) { return (vec)((mask & (ivec)x) | (~mask & (ivec)y)); }

/* The larger number, and y where either is NaN. */
INLINE vec larger(vec x, vec y) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX__)
  return (vec)_mm256_max_ps((__m256)x, (__m256)y);
#elif defined(__SSE__)
  return (vec)_mm_max_ps((__m128)x, (__m128)y);
#else
  return pick(x > y, x, y);
#endif
}

/* 0 in place of -inf. */
INLINE vec or_zero(vec x) { return pick(x == -INFINITY, fill(0), x); }

/* Whether any lane of a mask is set. */
INLINE int any(ivec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < LANES; i++) found |= mask[i];
  return found;
#endif
}

/* The sum of all lanes, by halves. */
INLINE float sum(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
#endif
}

/* (2^f - 1) / f for |f| <= 1/2, by the coefficients of a polynomial for 2^f, of which the first is 1. */
INLINE vec slope_by(vec f, const float *coefficients, int degree) {
  vec slope = fill(coefficients[degree]);
  UNROLLED for (int i = degree - 1; i > 0; i--) slope = slope * f + coefficients[i];
  return slope;
}

/* Coefficients, of which build.py bounds the remainders: for f in [-1/2, 1/2], and in [0, 1]. */
static const float power_near[] = {POWER};
#define DEGREE_OF(coefficients) ((int)(sizeof coefficients / sizeof *coefficients) - 1)

/* 2^y = 2^n 2^f with n the nearest integer, to which a sum with 1.5 2^23 rounds, and 2^f near 1 + f slope. */
typedef struct {
  ivec n;
  vec f, slope;
} powers;

/* y <= 0 counts as -127 below that. */
INLINE powers powers_of(vec y) {
  const vec rounds = fill(12582912.0f);
  y = larger(fill(-127.0f), y);
  vec n = (y + rounds) - rounds, f = y - n;
  return (powers){__builtin_convertvector(n, ivec), f, slope_by(f, power_near, DEGREE_OF(power_near))};
}

/* 2^y: exactly 0 at -inf, and NaN at NaN; no less than 2^127 where it is no less. The scaling adds n to the exponent's bits:
 * exact down to 2^-126, and 0 from y = -127 on, so that what underflows loses at most 2^-126.
 *
 * AVX-512 has instructions for f = y - n and for the scaling, with n the largest integer that is not above y. They give
 * the same down to there, and make f = 0 and 2^y = 0 of y = -inf. */
#if defined(__AVX512DQ__)
static const float power_above[] = {POWER_ABOVE}, short_power_above[] = {SHORT_POWER_ABOVE};
INLINE vec power_by(vec y, const float *coefficients, int degree) {
  const vec f = (vec)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF);
  return (vec)_mm512_scalef_ps((__m512)(slope_by(f, coefficients, degree) * f + 1), (__m512)y);
}
INLINE vec power(vec y) { return power_by(y, power_above, DEGREE_OF(power_above)); }
INLINE vec short_power(vec y) { return power_by(y, short_power_above, DEGREE_OF(short_power_above)); }
#else
INLINE vec power(vec y) {
  const powers p = powers_of(pick(y > 127, fill(127), y));
  return (vec)((ivec)(p.slope * p.f + 1) + (p.n << 23));
}
#endif

#endif
