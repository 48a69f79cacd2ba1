/* Tiles of keys and values as products read them: row by row, filled up with zeros to whole vectors of a block. Whole ones
 * are packed once for all blocks of queries where there are several, and the others by each block that reads them. */
#ifndef TILES_H
#define TILES_H

#include "pack.h"
#include "pool.h"

typedef struct {
  const float *keys, *values;
} packed_rows;

INLINE int64_t tile_size(const problem *p) { return KEYS * (up_to(p->H, PANEL) + up_to(p->E, PANEL)); }

INLINE int is_shared(const problem *p, int64_t start) { return p->tiles && start + KEYS <= p->S; }

INLINE float *shared_tile(const problem *p, int64_t b, int64_t k, int64_t start) {
  return p->tiles + ((b * p->K + k) * (p->S / KEYS) + start / KEYS) * tile_size(p);
}

/* Tile n of all heads, whose rows lie side by side in memory. */
INLINE void pack_for_all(const void *context, int64_t n) {
  const problem *p = context;
  const int64_t wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL);
  const int64_t b = n / (p->S / KEYS), start = n % (p->S / KEYS) * KEYS;
  for (int64_t s = 0; s < KEYS; s++) {
    const operand keys = beyond(p->key, at_key(p, b, start + s, 0, p->H));
    const operand values = beyond(p->value, at_key(p, b, start + s, 0, p->E));
    for (int64_t k = 0; k < p->K; k++)
      pack_rows(shared_tile(p, b, k, start) + s * wide_h, wide_h, 1, beyond(keys, k * p->H), 0, 1, p->H);
    for (int64_t k = 0; k < p->K; k++)
      pack_rows(shared_tile(p, b, k, start) + KEYS * wide_h + s * wide_e, wide_e, 1, beyond(values, k * p->E), 0, 1, p->E);
  }
}

/* All whole tiles, unless each is read by one block of queries only. */
INLINE void pack_tiles(problem *p, int64_t blocks, const threads *pool) {
  if (blocks == 1) p->tiles = 0;
  if (p->tiles) share(pool, p->B * (p->S / KEYS), pack_for_all, p);
}

/* The tile from `start` on, of which rows [first, first + count) are read: they alone are packed, into the room that is given,
 * where these are not all, as the others may be anything. */
INLINE packed_rows pack_of(const problem *p, int64_t b, int64_t k, int64_t start, int64_t first, int64_t count,
                            float *keys, float *values) {
  const int64_t wide_h = up_to(p->H, PANEL), wide_e = up_to(p->E, PANEL);
  if (is_shared(p, start) && count == KEYS) {
    const float *at = shared_tile(p, b, k, start);
    return (packed_rows){at, at + KEYS * wide_h};
  }
  pack_tile(keys, wide_h, beyond(p->key, at_key(p, b, first, k, p->H)), p->K * p->H, first - start, count, p->H);
  pack_tile(values, wide_e, beyond(p->value, at_key(p, b, first, k, p->E)), p->K * p->E, first - start, count, p->E);
  return (packed_rows){keys, values};
}

#endif
