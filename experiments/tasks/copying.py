"""Copy: repeat what stands before the separator."""

import numpy as np

from experiments.tasks.task import Examples, Task, expect


class Copy(Task):
    """L = T / 2 random symbols, a separator, and the same symbols again, which count.

    With an odd T a token of filling follows. Tokens: the symbols, then the separator and the filling.

    References:
        Graves et al., "Neural Turing machines", arXiv 1410.5401, section 4.1.
    """

    def check(self) -> None:
        expect(self.context >= 2, "model.context", self.context, "at least 2 for a copy")
        expect(1 <= self.symbols <= 2**15, "data.symbols", self.symbols, "from 1 to 2**15")

    @property
    def vocabulary(self) -> int:
        return self.symbols + 2

    def draw(self, rng: np.random.Generator, rows: int) -> Examples:
        T, L = self.context, self.context // 2
        source = rng.integers(self.symbols, size=(rows, L))
        tokens = np.full((rows, T + 1), self.symbols + 1, np.uint16)
        tokens[:, :L], tokens[:, L], tokens[:, L + 1 : 2 * L + 1] = source, self.symbols, source
        counts = np.zeros((rows, T), bool)
        counts[:, L : 2 * L] = True
        return Examples(tokens, counts)
