"""What every task is: a vocabulary, and examples drawn from a generator."""

import abc
import dataclasses
from typing import NamedTuple

import numpy as np


class Examples(NamedTuple):
    """Sequences of a task.

    Attributes:
        tokens: uint16 `B T+1`.
        counts: bool `B T`, whether the prediction of tokens[:, t + 1] counts; as many in each row.
    """

    tokens: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Sequences of T + 1 tokens in which some are answers that follow from the others.

    Attributes:
        context: T.
        symbols: how many different symbols the sequences are made of, for tasks that leave it open.
        pairs: key-value pairs in a sequence, for `mqar`.
        depth: operators inside each other, at most, for `listops`.
    """

    context: int
    symbols: int = 64
    pairs: int = 8
    depth: int = 3

    def __post_init__(self) -> None:
        self.check()

    @abc.abstractmethod
    def check(self) -> None:
        """Raises ValueError unless there are such sequences."""

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """How many different tokens there are; they are the integers below it."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator, rows: int) -> Examples:
        """As many sequences as `rows`, independent of each other."""


def expect(holds: bool, name: str, value: int, expected: str) -> None:
    """Raises ValueError, naming the field, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} is {value}: expected {expected}")
