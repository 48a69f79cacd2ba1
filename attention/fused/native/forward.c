/* Softmax attention by online softmax over tiles of keys, for a block of queries at a time.
 *
 * Logits stand upright, keys by queries: maxima, exponentials and sums of a query are then those of a lane, and neither
 * keys nor values are transposed. A block of queries of all heads that share a key head passes over the same tiles.
 */
#include "forward.h"

#include "cap.h"
#include "pack.h"
#include "pool.h"
#include "sight.h"

typedef struct {
  float *keys, *values, *weights, *queries, *outputs, *tops, *sums;
  sight *sights;
} room;

static room room_for(const problem *p) {
  int64_t width = up_to(p->E, PANEL), panels = p->G * (block_of(p) / PANEL);
  int64_t sizes[] = {KEYS * p->H, KEYS * width,   KEYS * PANEL,  panels * p->H * PANEL, panels * PANEL * width,
                     panels * PANEL, panels * PANEL, (panels * sizeof(sight) + 3) / 4};
  float *parts[8];
  workspace(parts, sizes, 8);
  return (room){parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], (sight *)parts[7]};
}

/* One tile of keys for one panel of queries. */
static void step(const problem *p, const room *r, int64_t panel, int64_t b, int64_t start, stretch keys) {
  const int64_t H = p->H, width = up_to(p->E, PANEL);
  const sight *seen = r->sights + panel;
  float *queries = r->queries + panel * H * PANEL, *outputs = r->outputs + panel * PANEL * width;
  float *tops = r->tops + panel * PANEL, *sums = r->sums + panel * PANEL, kept[PANEL];
  vec block[ROWS][COLUMNS], top[COLUMNS], total[COLUMNS];

  for (int j = 0; j < COLUMNS; j++) top[j] = load(tops + j * LANES), total[j] = (vec){0};
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    product(block, H, r->keys + key * H, H, 1, queries, PANEL);
    if (p->caps) cap(p, b, block);
    if (keys.masked) hide(p, seen, b, start + key, block);
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < COLUMNS; j++) {
        top[j] = larger(block[i][j], top[j]);
        store(r->weights + (key + i) * PANEL + j * LANES, block[i][j]);
      }
  }
  for (int j = 0; j < COLUMNS; j++) {
    vec before = load(tops + j * LANES);
    store(tops + j * LANES, top[j]);
    top[j] = pick(top[j] == -INFINITY, fill(0), top[j]);
    store(kept + j * LANES, power(before - top[j]));
  }
  for (int key = keys.begin; key < keys.end; key++)
    for (int j = 0; j < COLUMNS; j++) {
      float *at = r->weights + key * PANEL + j * LANES;
      vec weight = power(load(at) - top[j]);
      total[j] += weight;
      store(at, weight);
    }
  for (int j = 0; j < COLUMNS; j++)
    store(sums + j * LANES, load(sums + j * LANES) * load(kept + j * LANES) + total[j]);
  for (int64_t e = 0; e < width; e += PANEL)
    for (int q = 0; q < PANEL; q += ROWS) {
      const float *weights = r->weights + keys.begin * PANEL + q, *values = r->values + keys.begin * width + e;
      product(block, keys.end - keys.begin, weights, 1, PANEL, values, width);
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) {
          float *at = outputs + (q + i) * width + e + j * LANES;
          store(at, load(at) * kept[q + i] + block[i][j]);
        }
    }
}

/* The rows of a panel: sums of weighted values over sums of weights. */
static void finish(const problem *p, const room *r, int64_t panel, int64_t b, int64_t k, int64_t g, int64_t t) {
  const int64_t width = up_to(p->E, PANEL);
  for (int64_t i = 0; i < least(PANEL, p->T - t); i++) {
    float sum = r->sums[panel * PANEL + i], top = r->tops[panel * PANEL + i];
    float *row = r->outputs + (panel * PANEL + i) * width, whole = sum == 0 ? 1 : sum;
    for (int64_t e = 0; e < width; e += LANES) store(row + e, load(row + e) / fill(whole));
    memcpy(p->output + at_query(p, b, t + i, k, g, p->E), row, p->E * sizeof(float));
    p->level[at_level(p, b, k, g, t + i)] = sum == 0 ? -INFINITY : logf(sum) + top * LN2;
  }
}

static void item(const void *context, int64_t n) {
  const problem *p = context;
  const room r = room_for(p);
  const int64_t size = block_of(p), width = up_to(p->E, PANEL);
  /* The last blocks first: where causality shortens the others, the short ones fill up the end. */
  const int64_t b = n % (p->B * p->K) / p->K, k = n % p->K, from = (blocks_of(p) - 1 - n / (p->B * p->K)) * size;
  const int64_t columns = (least(size, p->T - from) + PANEL - 1) / PANEL, panels = p->G * columns;
  int64_t begin = p->S, end = 0;

  for (int64_t i = 0; i < panels; i++) {
    int64_t t = from + i % columns * PANEL;
    r.sights[i] = sight_of(p, b, k, i / columns, t);
    begin = least(begin, r.sights[i].begin), end = most(end, r.sights[i].end);
    pack_upright(r.queries + i * p->H * PANEL, p->query + at_query(p, b, t, k, i / columns, p->H), p->K * p->G * p->H,
                 least(PANEL, p->T - t), p->H, LOG2E);
  }
  memset(r.outputs, 0, panels * PANEL * width * sizeof(float));
  for (int64_t i = 0; i < panels * PANEL; i++) r.tops[i] = -INFINITY, r.sums[i] = 0;
  for (int64_t start = begin / KEYS * KEYS; start < end; start += KEYS) {
    int64_t first = most(start, begin), count = least(end, start + KEYS) - first;
    int32_t range[2];
    segment_range(p, b, start, range);
    pack_tile(r.keys, p->H, beyond(p->key, at_key(p, b, first, k, p->H)), p->K * p->H, first - start, count, p->H);
    pack_tile(r.values, width, beyond(p->value, at_key(p, b, first, k, p->E)), p->K * p->E, first - start, count, p->E);
    for (int64_t i = 0; i < panels; i++) {
      stretch keys = stretch_of(p, r.sights + i, start, range);
      if (keys.begin < keys.end) step(p, &r, i, b, start, keys);
    }
  }
  for (int64_t i = 0; i < panels; i++) finish(p, &r, i, b, k, i / columns, from + i % columns * PANEL);
}

void forward(const problem *p, const threads *pool) {
  share(pool, p->B * p->K * blocks_of(p), item, p);
}
