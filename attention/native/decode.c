/* A few queries over many keys, as in a decoding step: what memory bandwidth limits.
 *
 * Keys and values are read once, as they lie, with all heads of a token together, and nothing is packed. A part of the
 * keys is an item; the parts are merged in their order.
 */
#include "cap.h"
#include "forward.h"
#include "rows.h"
#include "sight.h"

#define AHEAD 16 /* tokens, by which memory is asked for a row before it is read: a quarter less time */

/* The running state of a part: for each row (b, k, g, t) of one b a maximum, a sum and E sums of values. */
typedef struct {
  float *tops, *sums, *outputs;
} state;

static state state_of(const problem *p, int64_t n) {
  const int64_t rows = p->K * p->G * p->T;
  float *at = p->partial + n * rows * (p->E + 2);
  return (state){at, at + rows, at + 2 * rows};
}

/* Logits are capped, and hidden ones become -inf; the row's maximum grows; logits become weights, whose sum is returned. */
static float weigh(const problem *p, float *logits, int64_t b, int64_t row, int64_t start, float *top, float *kept) {
  const int64_t t = row % p->T, head = row / p->T, at = b * p->T + t;
  const int in_range = p->first[at] <= start && start + KEYS <= (int64_t)p->last[at] + 1;
  const int all = in_range && !p->key_segments && !p->shown.data;
  for (int64_t i = 0; i < KEYS && p->caps; i += LANES)
    store(logits + i, capped(p->caps[b], ratio_of(p->caps[b], load(logits + i))));
  for (int64_t i = 0; i < KEYS && !all; i++) {
    int64_t key = start + i;
    int seen = p->first[at] <= key && key <= p->last[at];
    if (seen && p->key_segments) seen = p->query_segments[at] == p->key_segments[b * p->S + key];
    if (seen && p->shown.data) seen = *shown_at(p, b, head / p->G, head % p->G, t, key);
    if (!seen) logits[i] = -INFINITY;
  }
  return weights_of(logits, KEYS, top, kept);
}

/* Where the TOKENS rows from `key` on lie, and how far apart: those that exist and are read, or zeros. */
INLINE operand rows_at(const problem *p, operand from, int64_t size, int64_t b, int64_t k, int64_t key, int64_t begin,
                       int64_t end, float *room, int64_t *stride) {
  *stride = p->K * size;
  if (begin <= key && key + TOKENS <= end) return beyond(from, at_key(p, b, key, k, size));
  *stride = size;
  memset(room, 0, TOKENS * size * sizeof(float));
  for (int64_t n = most(key, begin); n < least(key + TOKENS, end); n++)
    widen(room + (n - key) * size, beyond(from, at_key(p, b, n, k, size)), size);
  return (operand){FLOAT32, room};
}

/* A tile of keys from `start` on, of which [begin, end) are read. */
static void tile(const problem *p, state s, int64_t b, int64_t start, int64_t begin, int64_t end, const float *queries,
                 float *logits, float *gained, float *room) {
  const int64_t rows = p->G * p->T, heads = p->K, first = begin / TOKENS * TOKENS;
  int64_t stride;
  for (int64_t key = first; key < end; key += TOKENS)
    for (int64_t k = 0; k < heads; k++) {
      operand keys = rows_at(p, p->key, p->H, b, k, key, begin, end, room, &stride);
      for (int64_t r = k * rows; r < (k + 1) * rows; r++)
        KNOWING_TYPE(keys, dots(logits + r * KEYS + key - start, queries + r * p->H, keys, stride, p->H, AHEAD * stride));
    }
  float kept[heads * rows];
  for (int64_t r = 0; r < heads * rows; r++) {
    float total = weigh(p, logits + r * KEYS, b, r, start, s.tops + r, kept + r);
    s.sums[r] = s.sums[r] * kept[r] + total;
  }
  memset(gained, 0, heads * rows * p->E * sizeof(float));
  for (int64_t key = first; key < end; key += TOKENS)
    for (int64_t k = 0; k < heads; k++) {
      operand values = rows_at(p, p->value, p->E, b, k, key, begin, end, room, &stride);
      for (int64_t r = k * rows; r < (k + 1) * rows; r++)
        KNOWING_TYPE(values, add_rows(gained + r * p->E, logits + r * KEYS + key - start, values, stride, p->E, AHEAD * stride));
    }
  for (int64_t r = 0; r < heads * rows; r++)
    for (int64_t e = 0; e < p->E; e++) {
      float *at = s.outputs + r * p->E + e;
      *at = *at * kept[r] + gained[r * p->E + e];
    }
}

static void part(const void *context, int64_t n) {
  const problem *p = context;
  const int64_t b = n / p->parts, rows = p->K * p->G * p->T, each = (p->S + p->parts - 1) / p->parts;
  const int64_t sizes[] = {rows * p->H, rows * KEYS, rows * p->E, TOKENS * most(p->H, p->E)};
  float *room[4];
  workspace(room, sizes, 4);
  const state s = state_of(p, n);
  for (int64_t r = 0; r < rows; r++) s.tops[r] = -INFINITY, s.sums[r] = 0;
  memset(s.outputs, 0, rows * p->E * sizeof(float));
  for (int64_t r = 0; r < rows; r++) {
    const float *query = p->query + at_query(p, b, r % p->T, 0, r / p->T, p->H);
    for (int64_t h = 0; h < p->H; h++) room[0][r * p->H + h] = query[h] * LOG2E;
  }
  const int64_t from = n % p->parts * up_to(each, KEYS), to = least(p->S, from + up_to(each, KEYS));
  int64_t begin = to, end = from;
  for (int64_t t = b * p->T; t < (b + 1) * p->T; t++) {
    if (p->first[t] > p->last[t]) continue;
    begin = least(begin, p->first[t]), end = most(end, (int64_t)p->last[t] + 1);
  }
  begin = most(begin, from), end = least(end, to);
  memset(room[1], 0, rows * KEYS * sizeof(float));
  for (int64_t start = begin / KEYS * KEYS; start < end; start += KEYS)
    tile(p, s, b, start, most(start, begin), least(start + KEYS, end), room[0], room[1], room[2],
         room[3]);
}

/* All parts of one row: those of larger maxima count for more. */
static void merge(const problem *p, int64_t b, int64_t row) {
  float top = -INFINITY, sum = 0, *output = p->output + at_query(p, b, row % p->T, 0, row / p->T, p->E);
  memset(output, 0, p->E * sizeof(float));
  for (int64_t n = 0; n < p->parts; n++) {
    const float found = state_of(p, b * p->parts + n).tops[row];
    top = found > top ? found : top;
  }
  const float shift = top == -INFINITY ? 0 : top;
  for (int64_t n = 0; n < p->parts; n++) {
    const state s = state_of(p, b * p->parts + n);
    const float kept = power(fill(s.tops[row] - shift))[0];
    sum += kept * s.sums[row];
    for (int64_t e = 0; e < p->E; e++) output[e] += kept * s.outputs[row * p->E + e];
  }
  for (int64_t e = 0; e < p->E; e++) output[e] /= sum == 0 ? 1 : sum;
  p->level[b * p->K * p->G * p->T + row] = sum == 0 ? -INFINITY : logf(sum) + top * LN2;
}

void decode(const problem *p, const threads *pool) {
  share(pool, p->B * p->parts, part, p);
  for (int64_t b = 0; b < p->B; b++)
    for (int64_t row = 0; row < p->K * p->G * p->T; row++) merge(p, b, row);
}
