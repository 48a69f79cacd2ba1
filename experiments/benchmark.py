"""Benchmarks: `python -m experiments.benchmark exact` races exact attention; see --help for the others.

Contestants take turns, so that a busy machine slows all of them alike; what is reported is the median and the
quartiles of the ratio of their times within a round. Each benchmark writes results.json, and a figure as SVG and PNG.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import matplotlib as mpl
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

import attention
from experiments import linear, memory, race
from experiments.contestants import Cell, Contestant, kernels, ours, peers
from experiments.files import write_bytes, write_json
from experiments.runtime import environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
    """Chunked against jax.nn, and PyTorch where it is installed: time, rate and temporaries."""

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
    out: Path = Path("runs/benchmark/exact")
    """Folder for results.json, exact.svg and exact.png."""

    mine: ClassVar[str] = "Chunked"

    def cells(self) -> list[Cell]:
        axes = itertools.product(self.head_sizes, self.directions, self.causal, self.lengths)
        return [Cell(T, way == "gradient", causal, self.heads, H, self.dtype) for H, way, causal, T in axes]

    def contestants(self, cell: Cell) -> dict[str, Contestant]:
        return {self.mine: ours(cell, attention.Chunked())} | peers(cell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles(Exact):
    """Tile sizes of Chunked against its own choice."""

    lengths: tuple[int, ...] = (1024, 4096)
    """Tokens, T = S."""
    sizes: tuple[int, ...] = (256, 512, 1024)
    """Tiles of every one of these sizes in the queries, times each in the keys."""
    out: Path = Path("runs/benchmark/tiles")
    """Folder for results.json, tiles.svg and tiles.png."""

    def contestants(self, cell: Cell) -> dict[str, Contestant]:
        pairs = itertools.product(self.sizes, repeat=2)
        others = {f"{R} x {C}": ours(cell, attention.Chunked(query_chunk=R, key_chunk=C)) for R, C in pairs}
        return {self.mine: ours(cell, attention.Chunked())} | others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Exact):
    """One query over many keys, as in a decoding step: Chunked against jax.nn and PyTorch."""

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


Benchmark = (
    Annotated[Exact, tyro.conf.subcommand("exact")]
    | Annotated[Tiles, tyro.conf.subcommand("tiles")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Fused, tyro.conf.subcommand("fused")]
    | Annotated[memory.Memory, tyro.conf.subcommand("memory")]
    | Annotated[linear.Linear, tyro.conf.subcommand("linear")]
)


def run(benchmark: Exact) -> list[dict[str, Any]]:
    """Measures every cell and writes what was found."""
    console = Console(stderr=True)
    steps = track(benchmark.cells(), "measuring", console=console, disable=not console.is_terminal)
    mine, rounds, limit = benchmark.mine, benchmark.rounds, benchmark.seconds
    results = [race.raced(cell, benchmark.contestants(cell), mine, rounds, limit) for cell in steps]
    written(benchmark, results, race.figure(results, mine))
    Console().print(race.table(results, mine))
    return results


def written(benchmark: Any, results: list[dict[str, Any]], drawing: Figure) -> None:
    """Writes results.json and the figure into the benchmark's folder."""
    name = type(benchmark).__name__.lower()
    config = dataclasses.asdict(benchmark) | {"out": benchmark.out.name}
    record = {"benchmark": name, "config": config, "environment": _environment(), "cells": results}
    benchmark.out.mkdir(parents=True, exist_ok=True)
    write_json(benchmark.out / "results.json", record)
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        for kind, details in (("svg", {"Date": None}), ("png", None)):
            buffer = io.BytesIO()
            drawing.savefig(buffer, format=kind, dpi=150, metadata=details)
            write_bytes(benchmark.out / f"{name}.{kind}", buffer.getvalue())
    print(f"written: {benchmark.out}/results.json, {name}.svg, {name}.png")


def _environment() -> dict[str, Any]:
    """What a time depends on: the versions, the peers' too, the device, and the number of its cores."""
    found = environment()
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["versions"]["torch"] = metadata.version("torch")
    return found | {"cores": os.cpu_count()}


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark that the command line names."""
    benchmark = tyro.cli(Benchmark, args=arguments, description=__doc__, prog="python -m experiments.benchmark")
    if not benchmark.lengths or min(benchmark.lengths) < 1 or getattr(benchmark, "rounds", 1) < 1:
        sys.exit(f"lengths and rounds of {benchmark}: expected numbers of at least 1")
    if isinstance(benchmark, memory.Memory | linear.Linear):
        kind = memory if isinstance(benchmark, memory.Memory) else linear
        results = benchmark.measured()
        written(benchmark, results, kind.figure(results))
        Console().print(kind.table(results))
    else:
        run(benchmark)


if __name__ == "__main__":
    main()
