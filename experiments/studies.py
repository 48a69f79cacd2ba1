"""What a study is, where it trains, and how its rows are summed up. Those there are stand in `configs/studies/`."""

import dataclasses
import importlib
import math
import pkgutil
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from rich.console import Console

import configs.studies
from attention.registry import unknown
from experiments.campaign import execute, make_plan
from experiments.config import Data, Model, Optimizer, Run
from experiments.points import planned, to_dict_of
from experiments.presets import Sweep
from experiments.progress import View
from experiments.summary import Results, grouped
from experiments.train import train

SMALL = Run(
    steps=8,
    evaluate_every=4,
    evaluate_batches=1,
    model=Model(layers=1, width=16, heads=2, kv_heads=2, mlp_width=16, context=16),
    data=Data(batch=4),
    optimizer=Optimizer(warmup_steps=2),
)
"""A run of less than a second, for the small forms."""

Row = dict[str, Any]
"""`axes`, what was measured and where; `seed`; and `numbers`, by name, None where there is none (a run diverged)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a study measures with: its axes, where they are trained, and how many side by side, as `sweep` has it."""

    sweep: Sweep | None
    preset: str
    description: str
    command: str
    population: Literal["auto", "vmap", "loop"] = "auto"
    lanes: int = 16

    def swept(self) -> Results:
        """Trains all points as a sweep and returns their curves; `experiments.report` draws them, too."""
        sweep = self._planned()
        plan = make_plan(
            sweep,
            preset=self.preset,
            description=self.description,
            command=self.command,
            population=self.population,
            lanes=self.lanes,
        )
        return execute(plan, Console(stderr=True))

    def trained(self) -> list[tuple[dict[str, Any], Path]]:
        """Trains each point as a run of its own, with a checkpoint, and returns its axes and its folder."""
        sweep, found = self._planned(), []
        for point in planned(sweep.base, sweep.axes):
            folder = sweep.base.folder / sweep.base.name
            name = point.id.replace("=", "_")  # as names of runs must be
            run = dataclasses.replace(point.run, name=name, folder=folder, checkpoint_every=point.run.steps)
            train(run, view=_Quiet)
            found.append((to_dict_of(point.axes), folder / name))
        return found

    def _planned(self) -> Sweep:
        if self.sweep is None:
            raise ValueError(f"study {self.preset!r} has no sweep: it trains nothing")
        return self.sweep


class _Quiet(View):
    def tell(self, message: str) -> None:
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What a module of `configs/studies/` defines as `study`, and small enough for a test of its code as `smoke`.

    Attributes:
        sweep: what is trained; None for a study that trains nothing.
        measure: trains, by `Work.swept` or `Work.trained`, and returns the rows.
        figure: draws the summary of the rows; its docstring is the caption.
    """

    sweep: Sweep | None
    measure: Callable[[Work], list[Row]]
    figure: Callable[[list[Row]], Figure]


def study_names() -> list[str]:
    """The modules in `configs/studies/`."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.studies.__path__))


def load_study(name: str, *, smoke: bool = False) -> tuple[Study, str]:
    """A study, or its small form, and the docstring of its module.

    Raises:
        ValueError: there is no such study; the message gives the nearest name.
    """
    if name not in study_names():
        raise ValueError(unknown("study", name, study_names()))
    module = importlib.import_module(f"configs.studies.{name}")
    return (module.smoke if smoke else module.study), (module.__doc__ or "").strip()


def summarised(rows: Iterable[Row]) -> list[Row]:
    """Rows of equal axes as one, in the order of their first: of each number mean, extremes, deviation over seeds.

    A mean is None if a number is: one over the seeds that survived would flatter.
    """
    groups = grouped(rows, lambda row: tuple(row["axes"].items()))
    return [
        {
            "axes": dict(axes),
            "seeds": len(group),
            "numbers": {name: _spread([row["numbers"][name] for row in group]) for name in group[0]["numbers"]},
        }
        for axes, group in groups.items()
    ]


def _spread(numbers: list[float | None]) -> dict[str, float | None]:
    known = [number for number in numbers if number is not None and math.isfinite(number)]
    if len(known) < len(numbers):
        return dict.fromkeys(("mean", "low", "high", "deviation"))
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return {"mean": math.fsum(known) / len(known), "low": min(known), "high": max(known), "deviation": deviation}
