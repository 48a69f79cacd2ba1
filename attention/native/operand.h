/* Operands of 16 or 32 bits, read as float32, which holds every number of theirs. */
#ifndef OPERAND_H
#define OPERAND_H

#include <string.h>

#include "vectors.h"

typedef enum { FLOAT32, BFLOAT16, FLOAT16 } element;

/* Numbers, and their type. */
typedef struct {
  element type;
  const void *data;
} operand;

typedef uint16_t halves __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

INLINE int64_t size_of(operand x) { return x.type == FLOAT32 ? 4 : 2; }

/* The operand from its nth number on. */
INLINE operand beyond(operand x, int64_t n) { return (operand){x.type, (const char *)x.data + n * size_of(x)}; }

/* Compilers know the instruction for this, and some do not use it. */
INLINE ivec integers(halves x) {
#if defined(__AVX512F__)
  return (ivec)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (ivec)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, ivec);
#endif
}

/* Elsewhere than in hardware without arithmetic on subnormal numbers, which threads of XLA count as 0. */
INLINE vec from_float16(halves x) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX__) && defined(__F16C__)
  return (vec)_mm256_cvtph_ps((__m128i)x);
#else
  const ivec bits = integers(x), sign = (bits & 0x8000) << 16, rest = (bits & 0x7FFF) << 13;
  const vec normal = (vec)(rest + (112 << 23)), special = (vec)(rest + (224 << 23)); /* by what exponents differ */
  const vec subnormal = (vec)(rest + (113 << 23)) - 0x1p-14f;
  const vec size = pick(rest < 1 << 23, subnormal, pick(rest >= 31 << 23, special, normal));
  return (vec)((ivec)size | sign);
#endif
}

/* LANES numbers from the nth on. */
INLINE vec load_as_float32(operand x, int64_t n) {
  const void *from = beyond(x, n).data;
  if (x.type == FLOAT32) return load(from);
  if (x.type == FLOAT16) return from_float16(*(const halves *)from);
  return (vec)(integers(*(const halves *)from) << 16);
}

/* `count` < LANES numbers from the nth on, and zeros. */
INLINE vec load_few(operand x, int64_t n, int64_t count) {
  float room[LANES] = {0};
  memcpy(room, beyond(x, n).data, count * size_of(x));
  return load_as_float32((operand){x.type, room}, 0);
}

INLINE void store_few(float *to, vec x, int64_t count) { memcpy(to, &x, count * sizeof(float)); }

/* to[:count] = the first numbers of x. */
INLINE void widen(float *to, operand x, int64_t count) {
  if (x.type == FLOAT32) {
    memcpy(to, x.data, count * sizeof(float));
    return;
  }
  const int64_t whole = count / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) store(to + i, load_as_float32(x, i));
  if (whole < count) store_few(to + whole, load_few(x, whole, count - whole), count - whole);
}

/* A copy of a statement for each type that x may have, made for that type. */
#define KNOWING_TYPE(x, statement)  \
  switch ((x).type) {               \
    case FLOAT32:                   \
      (x).type = FLOAT32;           \
      statement;                    \
      break;                        \
    case BFLOAT16:                  \
      (x).type = BFLOAT16;          \
      statement;                    \
      break;                        \
    case FLOAT16:                   \
      (x).type = FLOAT16;           \
      statement;                    \
      break;                        \
  }

#endif
