/* What the queries of a panel see: of all keys, and of a tile of them. */
#ifndef SIGHT_H
#define SIGHT_H

#include "problem.h"
#include "product.h"

#ifndef KEYS
#error "KEYS, the keys of a tile, is set by build.py"
#endif

typedef struct {
  int32_t first[PANEL], last[PANEL], segment[PANEL]; /* of each query; queries beyond the last repeat it */
  int64_t begin, end;                                /* the keys that any query sees lie in [begin, end) */
  int64_t shared_begin, shared_end;                  /* those that every query sees, but for segments and the table */
  int32_t least_segment, most_segment;
  int64_t k, g, start; /* the head, and the first query */
} sight;

/* What is read of the tile of keys from `start` on, in whole rows of a block. */
typedef struct {
  int begin, end, masked;
} stretch;

typedef struct {
  int begin, end;
} span;

/* Whether any of a panel's queries reads a page, and whether all do. */
typedef struct {
  int any, all;
} readers;

INLINE sight sight_of(const problem *p, int64_t b, int64_t k, int64_t g, int64_t start) {
  sight s = {.begin = p->S, .shared_end = p->S, .least_segment = INT32_MAX, .most_segment = INT32_MIN};
  s.k = k, s.g = g, s.start = start;
  for (int i = 0; i < PANEL; i++) {
    int64_t at = b * p->T + least(start + i, p->T - 1);
    int32_t first = s.first[i] = p->first[at], last = s.last[i] = p->last[at];
    s.shared_begin = most(s.shared_begin, first);
    s.shared_end = least(s.shared_end, (int64_t)last + 1);
    if (first > last) continue;
    s.begin = least(s.begin, first);
    s.end = most(s.end, (int64_t)last + 1);
    if (!p->query_segments) continue;
    s.segment[i] = p->query_segments[at];
    s.least_segment = least(s.least_segment, s.segment[i]);
    s.most_segment = most(s.most_segment, s.segment[i]);
  }
  return s;
}

/* The least and the most of the segments of a tile of keys. */
INLINE void segment_range(const problem *p, int64_t b, int64_t start, int32_t range[2]) {
  range[0] = INT32_MAX, range[1] = INT32_MIN;
  if (!p->key_segments) return;
  for (int64_t s = start; s < least(start + KEYS, p->S); s++) {
    int32_t segment = p->key_segments[b * p->S + s];
    range[0] = least(range[0], segment), range[1] = most(range[1], segment);
  }
}

INLINE stretch stretch_of(const problem *p, const sight *s, int64_t start, const int32_t range[2]) {
  int64_t begin = most(s->begin - start, 0) / ROWS * ROWS, end = least(s->end - start, KEYS);
  int segments = p->key_segments && !(s->least_segment == s->most_segment && range[0] == range[1]);
  if (p->key_segments && (range[1] < s->least_segment || s->most_segment < range[0])) end = 0;
  int masked = p->shown.data || segments || start + begin < s->shared_begin || start + up_to(end, ROWS) > s->shared_end;
  return (stretch){(int)begin, (int)up_to(end, ROWS), masked};
}

INLINE readers readers_of(const problem *p, const sight *s, int64_t b, int64_t page) {
  const uint8_t *read = page_at(p, b, s->k, s->g, page, s->start);
  uint8_t any = 0, all = 1;
  if (s->start + PANEL <= p->T)
    for (int i = 0; i < PANEL; i++) any |= read[i], all &= read[i];
  else
    for (int i = 0; i < p->T - s->start; i++) any |= read[i], all &= read[i];
  return (readers){any, all};
}

/* The keys of a stretch that lie in the first of its pages, if any of a panel's queries reads that. A page is a run of its own,
 * whoever reads the next one: what rows beside it read must not move a row's sums. */
INLINE stretch run_of(const problem *p, const sight *s, int64_t b, int64_t start, stretch keys) {
  if (!p->pages) return keys;
  const int64_t page = (start + keys.begin) / p->page;
  const readers found = page < p->P ? readers_of(p, s, b, page) : (readers){0, 0};
  const int end = least(keys.end, (page + 1) * p->page - start);
  return (stretch){found.any ? keys.begin : end, end, keys.masked || !found.all};
}

/* Whether the last key that a panel sees lies in the tile from `start` on. */
INLINE int ends_in(const sight *s, int64_t start) { return start < s->end && s->end <= start + KEYS; }

/* What of a stretch as many queries see as a block has rows, from `row` on of a panel, but for segments. */
INLINE span keys_of_rows(const sight *s, int row, int64_t start, stretch keys) {
  if (!keys.masked) return (span){keys.begin, keys.end};
  int64_t begin = keys.end, end = keys.begin;
  for (int i = row; i < row + ROWS; i++) {
    if (s->first[i] > s->last[i]) continue;
    begin = least(begin, s->first[i] - start), end = most(end, s->last[i] + 1 - start);
  }
  return (span){(int)most(begin, keys.begin), (int)least(end, keys.end)};
}

/* The queries of a panel that see any of as many keys as a block has rows, but for segments; those between them too. */
INLINE span rows_of_keys(const sight *s, int64_t key) {
  span rows = {0, PANEL};
  if (s->shared_begin <= key && key + ROWS <= s->shared_end) return rows;
  while (rows.begin < rows.end && (s->first[rows.begin] >= key + ROWS || s->last[rows.begin] < key)) rows.begin++;
  while (rows.begin < rows.end && (s->first[rows.end - 1] >= key + ROWS || s->last[rows.end - 1] < key)) rows.end--;
  return rows;
}

/* All ones for each query of a panel that may see a key by the table. */
INLINE void shown_to(const problem *p, const sight *s, int64_t b, int64_t key, int32_t shown[PANEL]) {
  for (int q = 0; q < PANEL; q++)
    shown[q] = -(int32_t)*shown_at(p, b, s->k, s->g, least(s->start + q, p->T - 1), least(key, p->S - 1));
}

/* All ones for each query of a panel that reads the page of a key. */
INLINE void read_by(const problem *p, const sight *s, int64_t b, int64_t key, int32_t read[PANEL]) {
  const uint8_t *at = page_at(p, b, s->k, s->g, key / p->page, s->start);
  for (int q = 0; q < PANEL; q++) read[q] = -(int32_t)at[least(q, p->T - 1 - s->start)];
}

/* -inf in place of the logits of keys from `key` on that a query does not see. */
INLINE void hide(const problem *p, const sight *s, int64_t b, int64_t key, vec logits[ROWS][COLUMNS]) {
  int32_t shown[ROWS][PANEL], read[PANEL];
  if (p->pages) read_by(p, s, b, key, read);
  for (int i = 0; p->shown.data && i < ROWS; i++) shown_to(p, s, b, key + i, shown[i]);
  UNROLLED for (int j = 0; j < COLUMNS; j++) {
    ivec first = load_integers(s->first + j * LANES), last = load_integers(s->last + j * LANES);
    ivec segment = load_integers(s->segment + j * LANES);
    UNROLLED for (int i = 0; i < ROWS; i++) {
      int32_t here = (int32_t)key + i;
      ivec seen = (first <= here) & (last >= here);
      if (p->key_segments) seen &= segment == p->key_segments[b * p->S + least(here, p->S - 1)];
      if (p->shown.data) seen &= load_integers(shown[i] + j * LANES);
      if (p->pages) seen &= load_integers(read + j * LANES);
      logits[i][j] = pick(seen, logits[i][j], fill(-INFINITY));
    }
  }
}

#endif
