"""Benchmarks: `python -m experiments.benchmark exact` races exact attention; see --help for the others.

Contestants take turns, so that a busy machine slows all of them alike; what is reported is the median and the
quartiles of the ratio of their times within a round. Each benchmark writes results.json, and a figure as SVG and PNG.
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attention
from experiments import (
    certified,
    coverage,
    features,
    linear,
    memory,
    probe_cost,
    race,
    side_by_side,
    sparse,
    temperature,
    throughput,
)
from experiments.contestants import Cell, Contestant, kernels, ours, peers
from experiments.records import written
from experiments.runtime import keep_memory


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


Benchmark = (
    Annotated[Exact, tyro.conf.subcommand("exact")]
    | Annotated[Tiles, tyro.conf.subcommand("tiles")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Fused, tyro.conf.subcommand("fused")]
    | Annotated[Sparse, tyro.conf.subcommand("sparse")]
    | Annotated[memory.Memory, tyro.conf.subcommand("memory")]
    | Annotated[throughput.Throughput, tyro.conf.subcommand("throughput")]
    | Annotated[certified.Certified, tyro.conf.subcommand("certified")]
    | Annotated[coverage.Coverage, tyro.conf.subcommand("coverage")]
    | Annotated[temperature.Temperature, tyro.conf.subcommand("temperature")]
    | Annotated[linear.Linear, tyro.conf.subcommand("linear")]
    | Annotated[features.Features, tyro.conf.subcommand("features")]
    | Annotated[probe_cost.Probes, tyro.conf.subcommand("probes")]
    | Annotated[side_by_side.Population, tyro.conf.subcommand("population")]
)


def drawn(benchmark: Any, results: list[dict[str, Any]]) -> tuple[Figure, Table]:
    """The results as a figure and as a table: by `race`, or by the module of a benchmark that is none."""
    if isinstance(benchmark, Exact):
        return race.figure(results, benchmark.mine), race.table(results, benchmark.mine)
    module = sys.modules[type(benchmark).__module__]
    return module.figure(results), module.table(results)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark that the command line names."""
    benchmark = tyro.cli(Benchmark, args=arguments, description=__doc__, prog="python -m experiments.benchmark")
    instead = getattr(benchmark, "operands", ())  # of random operands of any length
    for name in ("lengths", "members", "numbers", "rounds"):
        counts = np.atleast_1d(getattr(benchmark, name, 1))
        if counts.min(initial=1) < 1 or not (counts.size or instead):
            sys.exit(f"{name} is {getattr(benchmark, name)}: expected numbers of at least 1")
    if getattr(benchmark, "keep_memory", True):
        keep_memory()
    results = benchmark.measured()
    figure, table = drawn(benchmark, results)
    written(benchmark, results, figure)
    Console().print(table)


if __name__ == "__main__":
    main()
