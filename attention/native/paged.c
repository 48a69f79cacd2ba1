/* A step of decoding over some pages of a cache: one query a head, which has a list of the pages that it reads.
 *
 * A page is C keys of one head, one behind the other. The list is read in PARTS, as many items, which are merged in order.
 */
#include "cap.h"
#include "forward.h"
#include "rows.h"

/* Of a part of a list: the maximum, the sum of weights, and that of weighted values. */
typedef struct {
  float *top, *sum, *output;
} state;

static state state_of(const paged_problem *p, int64_t n) {
  float *at = p->partial + n * (p->E + 2);
  return (state){at, at + 1, at + 2};
}

/* The keys of a page that the query sees get weights; returns by what earlier sums are to be multiplied. */
static float weigh(const paged_problem *p, float *logits, int64_t b, int64_t start, const state *s) {
  for (int64_t i = 0; i < p->C && p->caps; i += LANES)
    store(logits + i, capped(p->caps[b], ratio_of(p->caps[b], load(logits + i))));
  for (int64_t i = 0; i < up_to(p->C, LANES); i++)
    if (i >= p->C || start + i < p->first[b] || start + i > p->last[b]) logits[i] = -INFINITY;
  float kept;
  const float total = weights_of(logits, up_to(p->C, LANES), s->top, &kept);
  *s->sum = *s->sum * kept + total;
  return kept;
}

/* TOKENS values from `token` on of a page, with zeros for those that the query does not see, which may be anything. */
INLINE operand values_at(const paged_problem *p, operand values, int64_t b, int64_t token, float *room) {
  const int64_t begin = most(token, p->first[b]), end = least(token + TOKENS, (int64_t)p->last[b] + 1);
  if (end - begin == TOKENS) return beyond(values, token * p->E);
  memset(room, 0, TOKENS * p->E * sizeof(float));
  for (int64_t i = begin; i < end; i++) widen(room + (i - token) * p->E, beyond(values, i * p->E), p->E);
  return (operand){FLOAT32, room};
}

static void part(const void *context, int64_t n) {
  const paged_problem *p = context;
  const int64_t head = n / PARTS, each = (p->m + PARTS - 1) / PARTS, from = n % PARTS * each, b = head / (p->K * p->G);
  const int64_t page = p->P * p->C * (head / p->G), sizes[] = {p->H, up_to(p->C, LANES), TOKENS * p->E};
  const int32_t *slots = p->slots + head * p->m;
  const state s = state_of(p, n);
  operand keys = beyond(p->key, page * p->H), values = beyond(p->value, page * p->E);
  float *room[3];
  workspace(room, sizes, 3);
  *s.top = -INFINITY, *s.sum = 0;
  memset(s.output, 0, p->E * sizeof(float));
  for (int64_t h = 0; h < p->H; h++) room[0][h] = p->query[head * p->H + h] * LOG2E;
  for (int64_t i = from; i < least(from + each, p->m); i++) {
    if (slots[i] < 0) continue;
    const int64_t start = slots[i] * p->C, next = i + 1 < p->m && slots[i + 1] >= 0 ? slots[i + 1] * p->C : start;
    for (int64_t c = 0; c < p->C; c += TOKENS) {
      operand rows = beyond(keys, (start + c) * p->H);
      KNOWING_TYPE(rows, dots(room[1] + c, room[0], rows, p->H, p->H, (next - start) * p->H));
    }
    const float kept = weigh(p, room[1], b, start, &s);
    for (int64_t e = 0; e < p->E; e++) s.output[e] *= kept;
    for (int64_t c = 0; c < p->C; c += TOKENS) {
      operand rows = values_at(p, values, b, start + c, room[2]);
      KNOWING_TYPE(rows, add_rows(s.output, room[1] + c, rows, p->E, p->E, (next - start) * p->E));
    }
  }
}

static void merge(const paged_problem *p, int64_t head) {
  float top = -INFINITY, sum = 0, *output = p->output + head * p->E;
  memset(output, 0, p->E * sizeof(float));
  for (int64_t n = 0; n < PARTS; n++) {
    const float found = *state_of(p, head * PARTS + n).top;
    top = found > top ? found : top;
  }
  for (int64_t n = 0; n < PARTS; n++) {
    const state s = state_of(p, head * PARTS + n);
    const float kept = power(fill(*s.top - (top == -INFINITY ? 0 : top)))[0];
    sum += kept * *s.sum;
    for (int64_t e = 0; e < p->E; e++) output[e] += kept * s.output[e];
  }
  for (int64_t e = 0; e < p->E; e++) output[e] /= sum == 0 ? 1 : sum;
  p->level[head] = sum == 0 ? -INFINITY : logf(sum) + top * LN2;
}

void paged(const paged_problem *p, const threads *pool) {
  const int64_t heads = p->B * p->K * p->G;
  share(pool, heads * PARTS, part, p);
  for (int64_t head = 0; head < heads; head++) merge(p, head);
}
