"""Linear attention against exact: how time and memory grow with the length, and from where on linear is faster."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attention
from experiments.contestants import Cell, Contestant, in_jax, ours
from experiments.drawing import COLOURS, MARKERS
from experiments.race import raced
from experiments.timing import interleaved, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Performer with each number of features against Chunked: time, growth, crossover, memory, decoding."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 16384, 65536)
    """Tokens, T = S."""
    features: tuple[int, ...] = (64, 256)
    """Features, M."""
    heads: int = 8
    """Heads, N."""
    head_size: int = 64
    """Size of a head, H."""
    exact_up_to: int = 16384
    """The greatest length at which Chunked runs."""
    growth_from: int = 4096
    """The least length that counts for the exponent of growth."""
    positions: tuple[int, ...] = (100, 100_000)
    """Tokens before the one that is decoded."""
    rounds: int = 5
    """Turns of each contestant."""
    seconds: float = 5.0
    """Of a cell, after which no more turns begin; there are at least 3."""
    out: Path = Path("runs/benchmark/linear")
    """Folder for results.json, linear.svg and linear.png."""

    def measured(self) -> list[dict[str, Any]]:
        console = Console(stderr=True)
        axes = list(itertools.product((False, True), self.lengths))
        steps = track(axes, "measuring", console=console, disable=not console.is_terminal)
        cells = [Cell(T, gradient, True, self.heads, self.head_size) for gradient, T in steps]
        mine = name(self.features[0])
        found = [raced(cell, self.contestants(cell), mine, self.rounds, self.seconds) for cell in cells]
        return [*found, self.decoding(), summary(found, self)]

    def contestants(self, cell: Cell) -> dict[str, Contestant]:
        """Performers, and Chunked where the cell is short enough."""
        linear = {name(M): in_jax(cell, attend(M, cell.head_size)) for M in self.features}
        return linear | ({"Chunked": ours(cell, attention.Chunked())} if cell.length <= self.exact_up_to else {})

    def decoding(self) -> dict[str, Any]:
        """Seconds of one token after each number of tokens."""
        calls = {str(position): one_token(position, self) for position in self.positions}
        return {"label": "decoding", "seconds": {n: spread(s) for n, s in interleaved(calls, 40, self.seconds).items()}}


def name(features: int) -> str:
    return f"Performer, M = {features}"


def attend(features: int, head_size: int):
    """Causal attention by a Performer whose projection is drawn once."""
    method = attention.Performer(features=features)
    params = method.init(jax.random.key(0), num_heads=1, head_dim=head_size)
    return functools.partial(attention.dot_product_attention, method=method, params=params, is_causal=True)


def one_token(position: int, benchmark: Linear, tokens: int = 64):
    """A call that decodes 64 tokens one by one, after `position` others."""
    N, H, M = benchmark.heads, benchmark.head_size, benchmark.features[0]
    method = attention.Performer(features=M)
    params = method.init(jax.random.key(0), num_heads=1, head_dim=H)
    state = method.init_state(1, N, H, position + tokens, jnp.float32)
    before = jax.random.normal(jax.random.key(1), (3, 1, position, N, H))
    state, _ = jax.jit(functools.partial(method.extend, params=params))(state, *before)
    new = jax.random.normal(jax.random.key(2), (3, 1, 1, N, H))
    step = jax.jit(functools.partial(method.extend, params=params))

    def call():
        now = state
        for _ in range(tokens):
            now, output = step(now, *new)
        return output.block_until_ready()

    return call


def summary(results: list[dict[str, Any]], benchmark: Linear) -> dict[str, Any]:
    """By which power of T time grows, from which length on each Performer is faster than Chunked, and memory.

    Of memory, the bytes of temporaries that the backward pass adds from the least to the greatest number of features at
    the greatest length, beside those of one state a chunk.
    """
    found: dict[str, Any] = {"label": "summary", "growth": {}, "crossover": {}}
    few, many, T = min(benchmark.features), max(benchmark.features), max(benchmark.lengths)
    room = next(r["temporaries"] for r in results if r["cell"]["gradient"] and r["cell"]["length"] == T)
    if None not in (room[name(few)], room[name(many)]):
        chunks = -(-T // attention.Performer().chunk)
        states = 4 * benchmark.heads * chunks * (many - few) * (benchmark.head_size + 1)
        found["temporaries"] = {"added": room[name(many)] - room[name(few)], "states": states}
    for label in dict.fromkeys(result["label"] for result in results):
        times = times_of(results, label)
        for who, series in times.items():
            long = [(T, second) for T, second in series if benchmark.growth_from <= T]
            if len(long) > 1:
                x, y = np.log(np.array(long)).T
                slope = np.polyfit(x, y, 1)[0]
                found["growth"].setdefault(label, {})[who] = float(slope)
            if who != "Chunked" and "Chunked" in times:
                found["crossover"].setdefault(label, {})[who] = crossover(series, times["Chunked"])
    return found


def crossover(mine: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> float | None:
    """From which length on the first curve of time is below the second, straight between measurements in logarithms.

    The last crossing where noise makes several; None where there is none.
    """
    both = [(np.log(T), np.log(a / b)) for (T, a), (_, b) in zip(mine, theirs, strict=False)]
    for (x, above), (y, below) in reversed(list(itertools.pairwise(both))):
        if above > 0 >= below:
            return float(np.exp(x + (y - x) * above / (above - below)))
    return None


def times_of(results: list[dict[str, Any]], label: str) -> dict[str, list[tuple[int, float]]]:
    """Length and median seconds of each contestant."""
    found: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        if result["label"] == label:
            for who, seconds in result["seconds"].items():
                found.setdefault(who, []).append((result["cell"]["length"], seconds["median"]))
    return found


def figure(results: list[dict[str, Any]]) -> Figure:
    """Time over length, forward and with the backward pass; and the temporaries of the latter."""
    raced = [result for result in results if "cell" in result]
    labels = list(dict.fromkeys(result["label"] for result in raced))
    drawing = Figure(figsize=(3.4 * (len(labels) + 1), 3.9), layout="constrained")
    panels = drawing.subplots(1, len(labels) + 1, squeeze=False)[0]
    found = next(result for result in results if result["label"] == "summary")
    for panel, label in zip(panels, labels, strict=False):
        for i, (who, series) in enumerate(times_of(raced, label).items()):
            slope, crossing = (found[what].get(label, {}).get(who) for what in ("growth", "crossover"))
            legend = who if slope is None else f"{who}: T^{slope:.2f}"
            if crossing is not None:
                legend += f", faster from T = {crossing:.0f}"
                panel.axvline(crossing, color=COLOURS[i], linestyle=":", linewidth=1)
            panel.plot(*zip(*series, strict=True), color=COLOURS[i], marker=MARKERS[i], label=legend)
        panel.set_title(label, fontsize=10)
        panel.set_ylabel("time (s)")
    for i, who in enumerate(times_of(raced, labels[-1])):
        those = [r for r in raced if r["label"] == labels[-1] and who in r["temporaries"]]
        sizes = [(r["temporaries"][who] or 0) / 2**20 for r in those]
        lengths = [r["cell"]["length"] for r in those]
        panels[-1].plot(lengths, sizes, color=COLOURS[i], marker=MARKERS[i], label=who)
    panels[-1].set_title(f"temporaries,\n{labels[-1]}", fontsize=10)
    panels[-1].set_ylabel("temporaries (MiB)")
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("length (tokens)")
        panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return drawing


def table(results: list[dict[str, Any]]) -> Table:
    """The same numbers for a terminal."""
    shown, found = Table("cell", "T", "contestant", "ms", "temporaries, MiB", title="medians"), results[-1]
    for result in results:
        for who, seconds in result.get("seconds", {}).items() if "cell" in result else ():
            room = (result["temporaries"][who] or 0) / 2**20
            cells = (result["label"], str(result["cell"]["length"]), who)
            shown.add_row(*cells, f"{1e3 * seconds['median']:.1f}", f"{room:.1f}")
    shown.caption = f"growth {found['growth']}, crossover {found['crossover']}"
    return shown
