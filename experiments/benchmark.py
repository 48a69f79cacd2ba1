"""Benchmarks: `python -m experiments.benchmark exact` races exact attention, `tiles` compares tile sizes.

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
from typing import Annotated, Any, Literal

import matplotlib as mpl
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.contestants import MATRIX_SIZE, Cell, Contestant, chunked, peers
from experiments.files import write_bytes, write_json
from experiments.runtime import environment
from experiments.timing import interleaved, ratios, spread

OURS = "Chunked"
# Okabe and Ito's palette, which the colour-blind can tell apart.
LOOKS = {"jax.nn": ("#D55E00", "s"), "PyTorch": ("#0072B2", "o"), "matrix product": ("#009E73", "^")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
    """Chunked against jax.nn, and PyTorch where it is installed: time, rate and temporaries."""

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens, T = S."""
    directions: tuple[Literal["forward", "gradient"], ...] = ("forward", "gradient")
    """Forward alone, or forward and backward."""
    causal: tuple[bool, ...] = (False, True)
    """Whether a query sees only what is before it."""
    heads: int = 8
    """Heads, N."""
    head_size: int = 64
    """Size of a head, H."""
    rounds: int = 9
    """Turns of each contestant."""
    out: Path = Path("runs/benchmark/exact")
    """Folder for results.json, exact.svg and exact.png."""

    def contestants(self, cell: Cell) -> dict[str, Contestant]:
        return {OURS: chunked(cell)} | peers(cell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles(Exact):
    """Tile sizes of Chunked against its own choice."""

    sizes: tuple[int, ...] = (256, 512, 1024)
    """Tiles of every one of these sizes in the queries, times each in the keys."""
    out: Path = Path("runs/benchmark/tiles")
    """Folder for results.json, tiles.svg and tiles.png."""

    def contestants(self, cell: Cell) -> dict[str, Contestant]:
        pairs = itertools.product(self.sizes, repeat=2)
        return {OURS: chunked(cell)} | {f"{R} x {C}": chunked(cell, R, C) for R, C in pairs}


Benchmark = Annotated[Exact, tyro.conf.subcommand("exact")] | Annotated[Tiles, tyro.conf.subcommand("tiles")]


def measured(benchmark: Exact, cell: Cell) -> dict[str, Any]:
    """Times, ratios to ours, rates and temporaries of every contestant in one cell."""
    contestants = benchmark.contestants(cell)
    seconds = interleaved({name: one.call for name, one in contestants.items()}, benchmark.rounds)
    operations = dict.fromkeys(contestants, cell.operations) | {"matrix product": 2.0 * MATRIX_SIZE**3}
    rates = {name: spread([operations[name] / second / 1e9 for second in times]) for name, times in seconds.items()}
    result: dict[str, Any] = {
        "cell": cell._asdict(),
        "label": cell.label,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "gigaflops": rates,
        "slower_than_ours": ratios(seconds, OURS),
        "temporaries": {name: one.temporaries for name, one in contestants.items()},
    }
    result["slower_than_ours"].pop("matrix product", None)  # another amount of work
    if "matrix product" in seconds:
        mine, theirs = ([operations[name] / second for second in seconds[name]] for name in (OURS, "matrix product"))
        result["share_of_matrix_product"] = spread([a / b for a, b in zip(mine, theirs, strict=True)])
    return result


def figure(results: list[dict[str, Any]]) -> Figure:
    """How many times slower than ours each contestant is, over the length; bars span the quartiles."""
    labels = list(dict.fromkeys(result["label"] for result in results))
    drawing = Figure(figsize=(3.2 * len(labels) + 0.6, 3.4), layout="constrained")
    panels = drawing.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for panel, label in zip(panels, labels, strict=True):
        cells = [result for result in results if result["label"] == label]
        lengths = [result["cell"]["length"] for result in cells]
        for i, name in enumerate(cells[0]["slower_than_ours"]):
            found = [result["slower_than_ours"][name] for result in cells]
            middle = [ratio["median"] for ratio in found]
            below = [ratio["median"] - ratio["lower_quartile"] for ratio in found]
            above = [ratio["upper_quartile"] - ratio["median"] for ratio in found]
            colour, marker = LOOKS.get(name, (mpl.colormaps["cividis"](i / 9), "os^Dv"[i % 5]))
            panel.errorbar(lengths, middle, (below, above), color=colour, marker=marker, label=name, capsize=2)
        panel.axhline(1, color="#555555", linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        panel.set_title(label, fontsize=10)
        panel.set_xlabel("length (tokens)")
    panels[0].set_ylabel(f"time / time of {OURS} (ratio)")
    panels[0].legend(frameon=False, fontsize=8)
    return drawing


def table(results: list[dict[str, Any]]) -> Table:
    """The same numbers for a terminal."""
    names = list(results[0]["seconds"])
    shown = Table("cell", "T", *(f"{name}, ms" for name in names), "temporaries, MiB", title="medians")
    for result in results:
        times = (f"{1e3 * result['seconds'][name]['median']:.1f}" for name in names)
        room = result["temporaries"][OURS]
        shown.add_row(
            result["label"], str(result["cell"]["length"]), *times, "?" if room is None else f"{room / 2**20:.1f}"
        )
    return shown


def run(benchmark: Exact) -> list[dict[str, Any]]:
    """Measures every cell and writes what was found."""
    axes = itertools.product(benchmark.directions, benchmark.causal, benchmark.lengths)
    cells = [Cell(T, way == "gradient", causal, benchmark.heads, benchmark.head_size) for way, causal, T in axes]
    console = Console(stderr=True)
    steps = track(cells, "measuring", console=console, disable=not console.is_terminal)
    results = [measured(benchmark, cell) for cell in steps]
    name = type(benchmark).__name__.lower()
    config = dataclasses.asdict(benchmark) | {"out": benchmark.out.name}
    record = {"benchmark": name, "config": config, "environment": _environment(), "cells": results}
    benchmark.out.mkdir(parents=True, exist_ok=True)
    write_json(benchmark.out / "results.json", record)
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        drawing = figure(results)
        for kind, details in (("svg", {"Date": None}), ("png", None)):
            buffer = io.BytesIO()
            drawing.savefig(buffer, format=kind, dpi=150, metadata=details)
            write_bytes(benchmark.out / f"{name}.{kind}", buffer.getvalue())
    Console().print(table(results))
    print(f"written: {benchmark.out}/results.json, {name}.svg, {name}.png")
    return results


def _environment() -> dict[str, Any]:
    """What a time depends on: the versions, the peers' too, the device, and the number of its cores."""
    found = environment()
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["versions"]["torch"] = metadata.version("torch")
    return found | {"cores": os.cpu_count()}


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark that the command line names."""
    benchmark = tyro.cli(Benchmark, args=arguments, description=__doc__, prog="python -m experiments.benchmark")
    if not benchmark.lengths or min(benchmark.lengths) < 1 or benchmark.rounds < 1:
        sys.exit(f"lengths {benchmark.lengths} and rounds {benchmark.rounds}: expected numbers of at least 1")
    run(benchmark)


if __name__ == "__main__":
    main()
