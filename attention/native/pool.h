/* Items shared among the threads of XLA's pool and the caller, and each thread's own room. */
#ifndef POOL_H
#define POOL_H

#include <stdint.h>

#include "xla/ffi/api/c_api.h"

typedef struct {
  const XLA_FFI_Api *api;
  XLA_FFI_ExecutionContext *context;
} threads;

int64_t pool_size(const threads *pool);

/* Calls work(context, n) for every n < items and returns when all are done. Threads take them in turn. */
void share(const threads *pool, int64_t items, void (*work)(const void *context, int64_t n), const void *context);

/* `count` arrays of the given sizes, aligned for vectors, in room that the thread keeps until its next call. */
void workspace(float **parts, const int64_t *sizes, int count);

#endif
