/* The kernels. */
#ifndef FORWARD_H
#define FORWARD_H

#include "pool.h"
#include "problem.h"

/* query, output: B K G H and B K G E; key, value: B K P C H and B K P C E; slots: B K G m, pages or -1; first, last: B, the keys
 * that are seen; caps: B, or none; level: B K G; partial: room for B K G PARTS (E + 2) numbers. */
typedef struct {
  int64_t B, K, G, P, C, H, E, m;
  const float *query, *caps;
  operand key, value;
  const int32_t *slots, *first, *last;
  float *output, *level, *partial;
} paged_problem;

void forward(const problem *p, const threads *pool);
void halved(const problem *p, const threads *pool);
void backward(const problem *p, const threads *pool);
void decode(const problem *p, const threads *pool);
void paged(const paged_problem *p, const threads *pool);

#endif
