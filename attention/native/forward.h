/* The kernels. */
#ifndef FORWARD_H
#define FORWARD_H

#include "pool.h"
#include "problem.h"

void forward(const problem *p, const threads *pool);
void halved(const problem *p, const threads *pool);
void backward(const problem *p, const threads *pool);
void decode(const problem *p, const threads *pool);

#endif
