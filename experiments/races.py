"""The races between ways to attend: which contestants, on which operands.

Contestants take turns, so that a busy machine slows all of them alike; what is reported is the median and the
quartiles of the ratio of their times within a round.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console
from rich.progress import track

import attention
from experiments import race, sparse
from experiments.contestants import Cell, Contestant, kernels, ours, peers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
    """Fused against Chunked, jax.nn, and PyTorch where it is installed: time, rate and temporaries."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Tokens, T = S."""
    directions: tuple[Literal["forward", "gradient"], ...] = ("forward", "gradient")
    """Forward alone, or forward and backward."""
    causal: tuple[bool, ...] = (False, True)
    """Whether a query sees only what is before it."""
    heads: int = 8
    """Heads, N."""
    head_sizes: tuple[int, ...] = (64,)
    """Sizes of a head, H."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the operands."""
    rounds: int = 9
    """Turns of each contestant."""
    seconds: float = 60.0
    """Of a cell, after which no more turns begin; there are at least 3."""
    keep_memory: bool = True
    """Whether freed memory is kept, as by every command here; False: as in a process that knows nothing of this one."""
    out: Path = Path("runs/benchmark/exact")
    """Folder for results.json, exact.svg and exact.png."""

    mine: ClassVar[str] = "Fused"

    def cells(self) -> list[Cell]:
        axes = itertools.product(self.head_sizes, self.directions, self.causal, self.lengths)
        return [Cell(T, way == "gradient", causal, self.heads, H, self.dtype) for H, way, causal, T in axes]

    def contestants(self, cell: Cell) -> dict[str, Contestant]:
        return {self.mine: ours(cell, attention.Fused()), "Chunked": ours(cell, attention.Chunked())} | peers(cell)

    def measured(self) -> list[dict[str, Any]]:
        """One row a cell."""
        console = Console(stderr=True)
        cells = track(self.cells(), "measuring", console=console, disable=not console.is_terminal)
        return [race.raced(cell, self.contestants(cell), self.mine, self.rounds, self.seconds) for cell in cells]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles(Exact):
    """Tile sizes of Chunked against its own choice."""

    lengths: tuple[int, ...] = (1024, 4096)
    """Tokens, T = S."""
    sizes: tuple[int, ...] = (256, 512, 1024)
    """Tiles of every one of these sizes in the queries, times each in the keys."""
    out: Path = Path("runs/benchmark/tiles")
    """Folder for results.json, tiles.svg and tiles.png."""

    mine: ClassVar[str] = "Chunked"

    def contestants(self, cell: Cell) -> dict[str, Contestant]:
        pairs = itertools.product(self.sizes, repeat=2)
        others = {f"{R} x {C}": ours(cell, attention.Chunked(query_chunk=R, key_chunk=C)) for R, C in pairs}
        return {self.mine: ours(cell, attention.Chunked())} | others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Exact):
    """One query over many keys, as in a decoding step: Fused against Chunked, jax.nn and PyTorch."""

    lengths: tuple[int, ...] = (4096, 32768)
    """Keys, S."""
    out: Path = Path("runs/benchmark/decode")
    """Folder for results.json, decode.svg and decode.png."""

    def cells(self) -> list[Cell]:
        axes = itertools.product(self.head_sizes, self.lengths)
        return [Cell(S, False, False, self.heads, H, self.dtype, queries=1) for H, S in axes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused(Exact):
    """Fused("auto") against every kernel that takes the problem on this machine, and Chunked."""

    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Tokens, T = S."""
    head_sizes: tuple[int, ...] = (64, 128)
    """Sizes of a head, H."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the operands."""
    out: Path = Path("runs/benchmark/fused")
    """Folder for results.json, fused.svg and fused.png."""

    mine: ClassVar[str] = "auto"

    def contestants(self, cell: Cell) -> dict[str, Contestant]:
        return {self.mine: ours(cell, attention.Fused())} | kernels(cell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Exact):
    """Sparse attention against Chunked over the length and in decoding, and its selection against lax.top_k."""

    lengths: tuple[int, ...] = (4096, 16384)
    """Tokens, T = S."""
    decoded: tuple[int, ...] = (32768, 131072)
    """Tokens in the cache."""
    families: tuple[str, ...] = ("iid", "coherent runs")
    """What is in the cache."""
    rows: tuple[int, ...] = (4096,)
    """Entries of a row, of which k are selected."""
    k: int = 256
    """Entries that are selected."""
    out: Path = Path("runs/benchmark/sparse")
    """Folder for results.json, sparse.svg and sparse.png."""

    mine: ClassVar[str] = sparse.BASELINE

    def cells(self) -> list[Any]:
        heads, size = self.heads, self.head_sizes[0]
        pairs = [sparse.Pair(T, causal, heads, size) for causal, T in itertools.product(self.causal, self.lengths)]
        steps = [sparse.Step(S, heads, size, family) for S, family in itertools.product(self.decoded, self.families)]
        return [*pairs, *steps, *(sparse.Selection(S, min(self.k, S)) for S in self.rows)]

    def contestants(self, cell: Any) -> dict[str, Contestant]:
        return sparse.contestants(cell)
