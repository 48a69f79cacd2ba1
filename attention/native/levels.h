/* The weights of a tile of keys for a panel of queries, relative to a level of each query.
 *
 * Weights are mostly found relative to the levels that are there, and nobody looks for the largest logits. The sum of a
 * query's weights tells whether its level has to rise: then, and in a query's first tile, logits are kept until the largest
 * is known. What other queries see does not matter.
 *
 * A kernel includes this once it has defined `room`, and for a block of ROWS keys from `key` on `logits`, in powers of two,
 * `weights`, of logits less a shift, which are kept and added to totals, and `level`, of a query whose largest logit is known.
 */
#define MOST (2 * KEYS) /* that a query's weights of a tile may sum to; docs/bounds.md counts what that costs */

/* Relative to levels that stay. Which of them should have risen is in `rises`; if there are any it returns 0, and nothing
 * that has been found is changed. */
APART int weigh(const problem *p, const room *r, tile *t, int64_t panel, stretch keys, ivec rises[COLUMNS]) {
  float *levels = r->found.levels + panel * PANEL, *sums = r->found.sums + panel * PANEL;
  vec block[ROWS][COLUMNS], shift[COLUMNS], totals[COLUMNS];
  ivec known = {0}, risen = {0};
  UNROLLED for (int j = 0; j < COLUMNS; j++) {
    rises[j] = load(levels + j * LANES) == -INFINITY, known |= ~rises[j];
    shift[j] = or_zero(load(levels + j * LANES)), totals[j] = (vec){0};
  }
  if (!any(known)) return 0;
  pace(t, keys);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    logits(p, r, t, panel, keys, key, block);
    weights(r, key, block, shift, totals);
  }
  UNROLLED for (int j = 0; j < COLUMNS; j++) risen |= rises[j] |= totals[j] > MOST;
  if (any(risen)) return 0;
  UNROLLED for (int j = 0; j < COLUMNS; j++) store(sums + j * LANES, load(sums + j * LANES) + totals[j]);
  return 1;
}

/* What a panel has found so far, relative to levels that have risen. */
static void rescale(const problem *p, const sofar *f, int64_t panel, const float factors[PANEL]) {
  const int64_t width = up_to(p->E, PANEL);
  for (int64_t row = panel * PANEL; row < (panel + 1) * PANEL; row++) {
    const float factor = factors[row - panel * PANEL];
    f->sums[row] *= factor;
    for (int64_t e = 0; factor != 1 && e < width; e += LANES)
      store(f->outputs + row * width + e, load(f->outputs + row * width + e) * factor);
  }
}

/* Relative to levels of which those that are to rise are first raised to the largest of the tile's logits. */
APART void weigh_rising(const problem *p, const room *r, tile *t, int64_t panel, stretch keys,
                        const ivec rises[COLUMNS]) {
  float *levels = r->found.levels + panel * PANEL, *sums = r->found.sums + panel * PANEL, factors[PANEL];
  vec block[ROWS][COLUMNS], largest[COLUMNS], shift[COLUMNS], totals[COLUMNS];
  UNROLLED for (int j = 0; j < COLUMNS; j++) largest[j] = fill(-INFINITY);
  pace(t, keys);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    logits(p, r, t, panel, keys, key, block);
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++) {
        largest[j] = larger(block[i][j], largest[j]);
        store(r->logits + (key + i) * PANEL + j * LANES, block[i][j]);
      }
  }
  UNROLLED for (int j = 0; j < COLUMNS; j++) {
    const vec before = load(levels + j * LANES), above = level(largest[j]);
    const vec after = pick(rises[j] & (above > before), above, before);
    shift[j] = or_zero(after), totals[j] = (vec){0};
    store(factors + j * LANES, power(before - shift[j]));
    store(levels + j * LANES, after);
  }
  rescale(p, &r->found, panel, factors);
  for (int key = keys.begin; key < keys.end; key += ROWS) {
    UNROLLED for (int i = 0; i < ROWS; i++)
      UNROLLED for (int j = 0; j < COLUMNS; j++) block[i][j] = load(r->logits + (key + i) * PANEL + j * LANES);
    weights(r, key, block, shift, totals);
  }
  UNROLLED for (int j = 0; j < COLUMNS; j++) store(sums + j * LANES, load(sums + j * LANES) + totals[j]);
}
