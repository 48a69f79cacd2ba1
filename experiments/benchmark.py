"""Benchmarks: `python -m experiments.benchmark exact` races exact attention; see --help for the others.

Each writes results.json, and its figures as SVG and PNG; of times it reports ratios within rounds of contestants.
"""

import sys
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments import (
    certified,
    coverage,
    features,
    linear,
    memory,
    probe_cost,
    race,
    races,
    side_by_side,
    temperature,
    throughput,
)
from experiments.records import written
from experiments.runtime import keep_memory

Benchmark = (
    Annotated[races.Exact, tyro.conf.subcommand("exact")]
    | Annotated[races.Tiles, tyro.conf.subcommand("tiles")]
    | Annotated[races.Decode, tyro.conf.subcommand("decode")]
    | Annotated[races.Fused, tyro.conf.subcommand("fused")]
    | Annotated[races.Sparse, tyro.conf.subcommand("sparse")]
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


def drawn(benchmark: Any, results: list[dict[str, Any]]) -> tuple[dict[str, Figure], Table]:
    """The results as figures by name and as a table: by `race`, or by the module of a benchmark that is none."""
    name = type(benchmark).__name__.lower()
    if isinstance(benchmark, races.Exact):
        return {name: race.figure(results, benchmark.mine)}, race.table(results, benchmark.mine)
    module = sys.modules[type(benchmark).__module__]
    several = getattr(module, "figures", None)
    return several(results) if several else {name: module.figure(results)}, module.table(results)


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
    figures, table = drawn(benchmark, results)
    written(benchmark, results, figures)
    Console().print(table)


if __name__ == "__main__":
    main()
