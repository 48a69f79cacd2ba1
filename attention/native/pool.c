#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

/* What the helpers of one call share. The last of them to leave frees it: a helper that comes after the call has
 * returned finds no item left, and touches nothing else. */
typedef struct {
  atomic_int_fast64_t next, done, holders;
  int64_t items;
  void (*work)(const void *context, int64_t n);
  const void *context;
} job;

static void help(void *data) {
  job *j = data;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->items;) {
    j->work(j->context, n);
    atomic_fetch_add(&j->done, 1);
  }
  if (atomic_fetch_sub(&j->holders, 1) == 1) free(j);
}

/* Whether a call of XLA's failed; its message is not kept. */
static int failed(const threads *pool, XLA_FFI_Error *error) {
  if (!error) return 0;
  XLA_FFI_Error_Destroy_Args gone = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, 0, error};
  pool->api->XLA_FFI_Error_Destroy(&gone);
  return 1;
}

int64_t pool_size(const threads *pool) {
  int64_t size = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, 0, pool->context, &size};
  return failed(pool, pool->api->XLA_FFI_ThreadPool_NumThreads(&args)) ? 1 : size;
}

/* The caller works too, so that all is done even where every other thread is busy, or waits for the caller. */
void share(const threads *pool, int64_t items, void (*work)(const void *context, int64_t n), const void *context) {
  int64_t helpers = items < 2 ? 0 : pool_size(pool) - 1;
  job *j = helpers ? malloc(sizeof(job)) : 0;
  if (!j) {
    for (int64_t n = 0; n < items; n++) work(context, n);
    return;
  }
  if (helpers > items - 1) helpers = items - 1;
  *j = (job){.items = items, .work = work, .context = context, .holders = helpers + 2};
  for (int64_t i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, 0, pool->context, help, j};
    if (failed(pool, pool->api->XLA_FFI_ThreadPool_Schedule(&args))) atomic_fetch_sub(&j->holders, 1);
  }
  help(j); /* one of the two holds of the caller; the other keeps `done` until it is read for the last time */
  while (atomic_load(&j->done) < items) sched_yield();
  if (atomic_fetch_sub(&j->holders, 1) == 1) free(j);
}

static pthread_key_t kept;
static pthread_once_t once = PTHREAD_ONCE_INIT;

typedef struct {
  size_t size;
  void *at;
} slab;

static void drop(void *data) {
  free(((slab *)data)->at);
  free(data);
}
static void make_key(void) { pthread_key_create(&kept, drop); }

/* In whole units of 128, so that the next array is aligned. */
static size_t bytes_of(int64_t numbers) { return (numbers * sizeof(float) + 127) / 128 * 128; }

void workspace(float **parts, const int64_t *sizes, int count) {
  pthread_once(&once, make_key);
  slab *mine = pthread_getspecific(kept);
  if (!mine) pthread_setspecific(kept, mine = calloc(1, sizeof(slab)));
  size_t size = 0;
  for (int i = 0; i < count; i++) size += bytes_of(sizes[i]);
  if (mine->size < size) {
    free(mine->at);
    mine->at = aligned_alloc(128, size);
    mine->size = size;
    if (!mine->at) {
      fprintf(stderr, "attention: no memory for a workspace of %zu bytes\n", size);
      abort();
    }
  }
  char *at = mine->at;
  for (int i = 0; i < count; at += bytes_of(sizes[i]), i++) parts[i] = (float *)at;
}
