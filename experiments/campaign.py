"""A sweep from its plan to its results: what is left is trained, program by program, and every point is saved."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from experiments.checks import check_name
from experiments.config import Run, to_dict
from experiments.data import validation_batches
from experiments.display import Display
from experiments.levers import levers
from experiments.paths import UNSWEPT
from experiments.points import Point, by_program, planned, program_id, program_label, shown_part, to_dict_of
from experiments.population import Progress, train_together
from experiments.presets import Sweep
from experiments.programs import Traced, compiled, trace
from experiments.provenance import describe_corpus, describe_methods
from experiments.runtime import Interrupted, StopSignals, environment
from experiments.store import FORMAT, Store
from experiments.summary import Results, point_row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep that has been checked, and whose programs are traced, so that little can go wrong once it writes."""

    sweep: Sweep
    points: list[Point]
    programs: dict[Run, Traced]
    store: Store
    about: dict[str, str]
    overwrite: bool

    @property
    def folder(self) -> Path:
        """Where the sweep lives."""
        return self.store.folder

    def pending(self, points: list[Point]) -> list[Point]:
        """Those that are not finished."""
        return points if self.overwrite else [point for point in points if self.store.finished(point.id) is None]


def make_plan(
    sweep: Sweep,
    *,
    preset: str,
    description: str,
    command: str,
    population: Literal["auto", "vmap", "loop"] = "auto",
    lanes: int = 16,
    overwrite: bool = False,
) -> Plan:
    """Checks a sweep and traces the programs of its unfinished points. Nothing is written.

    Raises:
        ValueError, FileNotFoundError: the name, a point, the text, or the folder's content is not acceptable.
        UnsupportedError: a method cannot do what the model asks of it.
    """
    check_name(sweep.base.name)
    if lanes < 1:
        raise ValueError(f"lanes is {lanes}: expected an integer of at least 1")
    points = planned(sweep.base, sweep.axes)
    groups = by_program(points)
    batches = {static: validation_batches(static)[0] for static in groups}
    vmapped = population == "vmap" or (population == "auto" and jax.default_backend() != "cpu")
    manifest = _manifest(sweep, points, f"vmap over {lanes}" if vmapped else "loop")
    store = Store(Path(sweep.base.folder) / sweep.base.name, manifest)
    store.check(overwrite=overwrite)
    plan = Plan(
        sweep=sweep,
        points=points,
        programs={},
        store=store,
        about={"preset": preset, "description": description, "command": command},
        overwrite=overwrite,
    )
    for static, members in groups.items():
        if plan.pending(members):
            plan.programs[static] = trace(static, batches[static], min(lanes, len(members)) if vmapped else None)
    return plan


def _manifest(sweep: Sweep, points: list[Point], population: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "config": {name: value for name, value in to_dict(sweep.base).items() if name not in UNSWEPT},
        "axes": {name: [to_dict(value) for value in sweep.axes.values(name)] for name in sweep.axes.names},
        "population": population,
        "corpus": describe_corpus(sweep.base),
        "environment": {**environment(), "devices": jax.device_count()},
        "points": [to_dict_of(point.axes) for point in points],
    }


def execute(plan: Plan, console: Console) -> Results:
    """Trains the pending points of a plan and returns the contents of results.json, which it has written.

    Raises:
        Interrupted: SIGTERM or SIGINT; results.json holds the points that are finished.
        OSError: something could not be written; finished points are intact.
    """
    pending = {static: plan.pending(members) for static, members in by_program(plan.points).items()}
    left = sum(len(points) * static.steps for static, points in pending.items())
    plan.store.open(overwrite=plan.overwrite)
    count = sum(map(len, pending.values()))
    with StopSignals() as signals, Display(left, console) as display:
        if count < len(plan.points):
            display.note(f"{plan.folder}: {len(plan.points) - count} of {len(plan.points)} points are finished already")
        try:
            for static, points in by_program(plan.points).items():
                if pending[static]:
                    _run_program(plan, static, points, display, signals)
        except Interrupted:
            _write_results(plan)
            raise
    return _write_results(plan)


def _run_program(plan: Plan, static: Run, points: list[Point], display: Display, signals: StopSignals) -> None:
    axes, shown = plan.sweep.axes, dict.fromkeys(shown_part(point.run) for point in points)
    labels = {program_id(part): program_label(part, axes) for part in shown}
    display.note(f"compiling {', '.join(labels.values())}")
    program = compiled(plan.programs[static])
    for part, (name, label) in zip(shown, labels.items(), strict=True):
        if plan.store.program(name) is None:  # a resumed sweep keeps what the first compilation took
            plan.store.compiled(name, _program_record(part, label, program))
    lanes = program.lanes or 1
    for start in range(0, len(points), lanes):
        together = points[start : start + lanes]
        display.note(labels[program_id(shown_part(together[0].run))])
        unfinished = [point for point in together if plan.store.finished(point.id) is None]
        if not unfinished:
            continue
        # A point keeps its lane, and the lanes of finished points repeat another: the same program, the same bits.
        filled = [point if point in unfinished else unfinished[0] for point in together]
        filled += unfinished[:1] * (lanes - len(filled))

        def observe(progress: Progress, count: int = len(unfinished)) -> None:
            display.step(count, float(progress.losses[0]))
            if signals.received is not None:
                raise Interrupted(signals.received, _how_to_go_on(plan, signals.received))

        outcomes = train_together(program, [point.run for point in filled], observe)
        for point, outcome in zip(filled, outcomes, strict=True):
            if plan.store.finished(point.id) is None:
                name = program_id(shown_part(point.run))
                record = _point_record(point, name, outcome)
                plan.store.finish(record)
                display.skip(static.steps - max(record["steps"], 0))
                display.finished(point_row({"programs": {name: {"label": labels[name]}}}, record))


def _how_to_go_on(plan: Plan, signum: int) -> str:
    done = len(plan.points) - sum(plan.store.finished(point.id) is None for point in plan.points)
    return (
        f"stopped by signal {signum} with {done} of {len(plan.points)} points finished and saved in {plan.folder}; "
        f"to go on, run the same command again, without --overwrite: {plan.about['command']}"
    )


def _program_record(shown: Run, label: str, program: Any) -> dict[str, Any]:
    config = {name: value for name, value in to_dict(shown).items() if name not in UNSWEPT}
    return {
        "label": label,
        "reference": shown.attention.capabilities.exact and repr(shown.attention) == "Exact()",
        "config": config,
        "corpus": describe_corpus(shown),
        "resolved": describe_methods(shown),
        "lanes": program.lanes,
        "parameters": int(program.parameters),
        "timings": program.timings,
        "memory": program.memory,
        "cost": program.cost,
    }


def _point_record(point: Point, program: str, outcome: dict[str, Any]) -> dict[str, Any]:
    knobs = levers(point.run)
    scale, temperature = np.float32(knobs.scale), np.float32(point.run.temperature)
    return {
        "id": point.id,
        "program": program,
        "axes": to_dict_of(point.axes),
        "scale": float(scale),
        "temperature": float(temperature),
        "beta": float(scale / np.float32(knobs.temperature)),  # in float32, as attention divides them
        "learning_rate": point.run.optimizer.learning_rate,
        "seed": point.run.seed,
        **outcome,
    }


def _write_results(plan: Plan) -> Results:
    records = [record for point in plan.points if (record := plan.store.finished(point.id)) is not None]
    programs = {name: plan.store.program(name) for name in dict.fromkeys(record["program"] for record in records)}
    results = {
        **plan.store.manifest,
        "name": plan.sweep.base.name,
        **plan.about,
        "planned": len(plan.points),
        "programs": programs,
        "points": records,
    }
    plan.store.write_results(results)
    return results
