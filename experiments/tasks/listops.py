"""ListOps: the value of a nested expression."""

from collections.abc import Callable, Iterator

import numpy as np

from experiments.tasks.task import Examples, Task, expect

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda digits: int(np.median(digits)),
    "[SM": lambda digits: sum(digits) % 10,
}
WORDS = (*"0123456789", *OPERATORS, "]", "=", "")
"""What the tokens stand for; the last is filling."""
CLOSE, EQUALS, FILLING = range(14, 17)
ARGUMENTS = (2, 5)
"""The fewest and the most arguments of an operator."""
NESTED = 1 / 3
"""How often an argument is an expression, where the depth allows one."""


class ListOps(Task):
    """An expression like [MAX 4 [MIN 2 3 ] 1 ] of minima, maxima, medians and sums modulo 10; its value counts.

    An expression has at most `depth` operators inside each other, and is drawn anew until it fits into the context.
    "=" and the value follow, then filling.

    References:
        Nangia and Bowman, "ListOps", arXiv 1804.06028, section 2; Tay et al., "Long Range Arena", arXiv 2011.04006,
        section 2.2.1.
    """

    def check(self) -> None:
        shortest = ARGUMENTS[0] + 3  # an operator, its arguments, a bracket and "="
        expect(self.context >= shortest, "model.context", self.context, f"at least {shortest} for an expression")
        expect(self.depth >= 1, "data.depth", self.depth, "at least 1")

    @property
    def vocabulary(self) -> int:
        return len(WORDS)

    def draw(self, rng: np.random.Generator, rows: int) -> Examples:
        T = self.context
        tokens, counts = np.full((rows, T + 1), FILLING, np.uint16), np.zeros((rows, T), bool)
        uniform = _uniform(rng)
        for row in range(rows):
            expression, value = _expression(uniform, self.depth)
            while len(expression) > T - 1:
                expression, value = _expression(uniform, self.depth)
            end = len(expression)
            tokens[row, : end + 2] = [*expression, EQUALS, value]
            counts[row, end] = True
        return Examples(tokens, counts)


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(1024).tolist()


def _expression(uniform: Iterator[float], depth: int) -> tuple[list[int], int]:
    """The tokens of an expression, and its value."""
    operator = int(next(uniform) * len(OPERATORS))
    tokens, values = [10 + operator], []
    fewest, most = ARGUMENTS
    for _ in range(fewest + int(next(uniform) * (most - fewest + 1))):
        if depth > 1 and next(uniform) < NESTED:
            inner, value = _expression(uniform, depth - 1)
        else:
            value = int(next(uniform) * 10)
            inner = [value]
        tokens += inner
        values.append(value)
    return [*tokens, CLOSE], list(OPERATORS.values())[operator](values)
