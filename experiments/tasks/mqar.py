"""Multi-query associative recall: which value came with this key?"""

import numpy as np

from experiments.tasks.task import Examples, Task, expect

EXPONENT = 0.01
"""a in the distribution of the distances, as in the paper's experiments."""


class Mqar(Task):
    """Pairs of a key and a value, then each key once more at a random place; the value that follows it counts.

    The pairs stand at the beginning. What is left is cut into slots of two tokens, of which slot i, from 1 on, is
    chosen with a probability proportional to i^(a - 1), without replacement: most questions follow soon. Empty slots
    are filling. Keys are the lower half of the symbols, values the upper half; no key occurs twice among the pairs.
    Tokens: the symbols, then the filling.

    References:
        Arora et al., "Zoology", arXiv 2312.04927, section 3.1 and appendix E. There the value does not follow its
        question in the input; here it does, as in text, which gives away nothing, since each key is asked for once.
    """

    def check(self) -> None:
        most = (self.context + 1) // 4
        expect(1 <= self.pairs <= most, "data.pairs", self.pairs, f"from 1 to (model.context + 1) / 4 = {most}")
        expect(self.symbols <= 2**15, "data.symbols", self.symbols, "at most 2**15")
        expect(
            self.symbols >= 2 * self.pairs, "data.symbols", self.symbols, f"at least 2 data.pairs = {2 * self.pairs}"
        )

    @property
    def vocabulary(self) -> int:
        return self.symbols + 1

    def draw(self, rng: np.random.Generator, rows: int) -> Examples:
        T, P, half = self.context, self.pairs, self.symbols // 2
        keys = np.argsort(rng.random((rows, half)), axis=1)[:, :P]
        values = rng.integers(half, self.symbols, size=(rows, P))
        slots = 2 * P + 2 * _chosen(rng, rows, (T + 1 - 2 * P) // 2, P)
        tokens = np.full((rows, T + 1), self.symbols, np.uint16)
        tokens[:, 0 : 2 * P : 2], tokens[:, 1 : 2 * P : 2] = keys, values
        np.put_along_axis(tokens, slots, keys.astype(np.uint16), axis=1)
        np.put_along_axis(tokens, slots + 1, values.astype(np.uint16), axis=1)
        counts = np.zeros((rows, T), bool)
        np.put_along_axis(counts, slots, True, axis=1)
        return Examples(tokens, counts)


def _chosen(rng: np.random.Generator, rows: int, slots: int, count: int) -> np.ndarray:
    """`count` different slots a row, in random order, by the power law."""
    # The largest of log p + Gumbel noise are a sample without replacement.
    weights = (EXPONENT - 1) * np.log(np.arange(1, slots + 1)) + rng.gumbel(size=(rows, slots))
    return np.argsort(-weights, axis=1)[:, :count]
