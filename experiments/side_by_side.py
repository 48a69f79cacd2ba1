"""A training step of several points of a program: one after the other, or side by side under vmap."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.table import Table

from experiments.config import Run
from experiments.data import training_batches, validation_batches
from experiments.drawing import look
from experiments.levers import levers
from experiments.points import by_program, planned
from experiments.presets import load_preset, preset_names
from experiments.programs import joined, trace
from experiments.studies import load_study
from experiments.timing import interleaved, ratios, spread

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
    """A step of the points of a sweep's first program: one after the other, against all of them under vmap."""

    sweeps: tuple[str, ...] = ("quickstart",)
    """Presets and studies, whose first program's points are the members."""
    members: tuple[int, ...] = (1, 2, 4, 8)
    """Points that are trained together."""
    rounds: int = 15
    """Turns of each contestant."""
    seconds: float = 20.0
    """Of a sweep, after which no more turns begin; there are at least 3."""
    out: Path = Path("runs/benchmark/population")
    """Folder for results.json, population.svg and population.png."""

    def measured(self) -> list[dict[str, Any]]:
        """One row a sweep and number of members: seconds of a step of all, their ratio, compilation and memory."""
        return [row for name in self.sweeps for row in self._of(name)]

    def _of(self, name: str) -> list[dict[str, Any]]:
        static, runs = members(name)
        if min(self.members) > len(runs):
            raise ValueError(
                f"members is {self.members}: expected numbers of at most {len(runs)}, the points of {name}"
            )
        single = Steps(static, None)
        vmapped = {count: Steps(static, count) for count in self.members if count <= len(runs)}
        alone = [single.of([run]) for run in runs[: max(vmapped)]]
        calls: dict[str, Callable[[], Any]] = {}
        for count, steps in vmapped.items():
            calls[f"loop {count}"] = functools.partial(_each, alone[:count])
            calls[f"vmap {count}"] = steps.of(runs[:count])
        seconds = interleaved(calls, self.rounds, self.seconds)
        return [
            {
                "sweep": name,
                "attention": repr(static.attention),
                "members": count,
                "seconds": {kind: spread(seconds[f"{kind} {count}"]) for kind in ("loop", "vmap")},
                "loop_over_vmap": ratios(_pair(seconds, count), "vmap")["loop"],
                "compile_seconds": {"loop": single.seconds, "vmap": steps.seconds},
                "temporary_bytes": {"loop": single.temporaries, "vmap": steps.temporaries},
            }
            for count, steps in vmapped.items()
        ]


def members(name: str) -> tuple[Run, list[Run]]:
    """The first program of a preset or study, and the runs of its points.

    Raises:
        ValueError: there is none of this name, or it trains nothing.
    """
    sweep = load_preset(name)[0] if name in preset_names() else load_study(name)[0].sweep
    if sweep is None:
        raise ValueError(f"sweeps has {name!r}, a study that trains nothing: expected one with axes")
    static, points = next(iter(by_program(planned(sweep.base, sweep.axes)).items()))
    return static, [point.run for point in points]


class Steps:
    """The compiled training step of one run, or of `lanes` runs under vmap, with what compiling it took."""

    def __init__(self, static: Run, lanes: int | None):
        traced = trace(static, validation_batches(static)[0], lanes)
        start = time.perf_counter()
        self._step = traced.step.lower().compile()
        self.seconds = time.perf_counter() - start
        self.temporaries = int(self._step.memory_analysis().temp_size_in_bytes)
        self._init, self._lanes = traced.init.lower().compile(), lanes

    def of(self, runs: list[Run]) -> Callable[[], Any]:
        """A call that takes one more step of all runs, the batch brought along, and waits for it."""
        knobs, batch = joined([levers(run) for run in runs], self._lanes), next(training_batches(runs[0]))
        state = [self._init(knobs)]

        def call() -> None:
            state[0], metrics = self._step(state[0], joined([batch] * len(runs), self._lanes), knobs)
            jax.block_until_ready(metrics)

        return call


def _each(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def _pair(seconds: dict[str, list[float]], count: int) -> dict[str, list[float]]:
    return {kind: seconds[f"{kind} {count}"] for kind in ("loop", "vmap")}


def figure(results: list[dict[str, Any]]) -> Figure:
    """Time of the loop over that of vmap, whiskers over the quartiles; temporaries, and compilation of a step, over \
the members."""
    with mpl.rc_context({"font.size": 9}):
        drawing = Figure(figsize=(10.5, 3.4), layout="constrained")
        faster, room, compilation = drawing.subplots(1, 3)
    for index, name in enumerate(dict.fromkeys(row["sweep"] for row in results)):
        rows, (colour, marker) = [row for row in results if row["sweep"] == name], look(2 * index)
        counts, found = [row["members"] for row in rows], [row["loop_over_vmap"] for row in rows]
        middle = [ratio["median"] for ratio in found]
        below = [ratio["median"] - ratio["lower_quartile"] for ratio in found]
        above = [ratio["upper_quartile"] - ratio["median"] for ratio in found]
        faster.errorbar(counts, middle, (below, above), color=colour, marker=marker, capsize=3, label=name)
        for panel, quantity, unit in ((room, "temporary_bytes", MEBIBYTE), (compilation, "compile_seconds", 1)):
            for place, (kind, line) in enumerate((("vmap", "-"), ("loop", "--"))):
                sizes, (colour, marker) = [row[quantity][kind] / unit for row in rows], look(2 * index + place)
                panel.plot(counts, sizes, line, color=colour, marker=marker, label=f"{name}, {kind}")
    faster.axhline(1, color="#555555", linewidth=1, linestyle="--")
    for panel, label in (
        (faster, "time of the loop / time under vmap"),
        (room, "temporaries of a step (MiB)"),
        (compilation, "compilation of a step (s)"),
    ):
        _labelled(panel, label, sorted({row["members"] for row in results}))
    return drawing


def _labelled(panel: Axes, label: str, counts: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set(xlabel="members", ylabel=label)
    panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, color="#888888")
    panel.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2)


def table(results: list[dict[str, Any]]) -> Table:
    """The same numbers for a terminal."""
    shown = Table("sweep", "members", "loop, ms", "vmap, ms", "loop / vmap", "temporaries, MiB", "compilation, s")
    shown.caption = "temporaries and compilation: of the loop's program and of the vmapped one"
    for row in results:
        times = (f"{1e3 * row['seconds'][kind]['median']:.1f}" for kind in ("loop", "vmap"))
        room = " / ".join(f"{row['temporary_bytes'][kind] / MEBIBYTE:.1f}" for kind in ("loop", "vmap"))
        compilation = " / ".join(f"{row['compile_seconds'][kind]:.1f}" for kind in ("loop", "vmap"))
        ratio = f"{row['loop_over_vmap']['median']:.2f}"
        shown.add_row(row["sweep"], str(row["members"]), *times, ratio, room, compilation)
    return shown
