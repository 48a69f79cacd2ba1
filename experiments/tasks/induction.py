"""Induction: what followed the marker when it stood here before?"""

import numpy as np

from experiments.tasks.task import Examples, Task, expect


class Induction(Task):
    """Random symbols with a marker among them; the marker again at the end, after which its old successor counts.

    Tokens: the symbols, then the marker.

    References:
        Fu et al., "Hungry Hungry Hippos", arXiv 2212.14052, section 3.1.
        Olsson et al., "In-context learning and induction heads", arXiv 2209.11895.
    """

    def check(self) -> None:
        expect(self.context >= 3, "model.context", self.context, "at least 3: a marker, a symbol and a marker")
        expect(1 <= self.symbols <= 2**15, "data.symbols", self.symbols, "from 1 to 2**15")

    @property
    def vocabulary(self) -> int:
        return self.symbols + 1

    def draw(self, rng: np.random.Generator, rows: int) -> Examples:
        T, every = self.context, np.arange(rows)
        tokens = rng.integers(self.symbols, size=(rows, T + 1)).astype(np.uint16)
        place = rng.integers(T - 2, size=rows)
        tokens[every, place] = tokens[:, T - 1] = self.symbols
        tokens[:, T] = tokens[every, place + 1]
        counts = np.zeros((rows, T), bool)
        counts[:, T - 1] = True
        return Examples(tokens, counts)
