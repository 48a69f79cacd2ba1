"""The points of a sweep as runs: what each one is, what it is called, and which of them share a program."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import attention
from experiments.axes import Axes
from experiments.checks import check_run
from experiments.config import Run, to_dict
from experiments.paths import UNSWEPT, look_up, replaced

COLUMNS = ("scale", "temperature", "optimizer.learning_rate", "seed")
"""Traced axes by which tables and figures tell the points of one program apart."""
TRACED = (*COLUMNS, "evaluate_temperature", "soft_cap", "stretch")
"""Axes whose values a compiled step takes as arguments: they never cost another compilation."""


class Point(NamedTuple):
    """One run of a sweep."""

    id: str
    axes: Mapping[str, Any]
    run: Run


def planned(base: Run, axes: Axes) -> list[Point]:
    """The points of a sweep, checked.

    Raises:
        ValueError: a point sets a field that its configuration lacks, or is no run that could be trained, or
            two of them are the same run; the message names the point.
    """
    points: dict[str, Point] = {}
    for chosen in axes.points:
        try:
            run = applied(base, chosen)
            check_run(run)
        except ValueError as error:
            raise ValueError(f"point {to_dict_of(chosen)}: {error}") from error
        name = point_id(run, chosen)
        if name in points:
            raise ValueError(f"points {to_dict_of(points[name].axes)} and {to_dict_of(chosen)} are the same run")
        points[name] = Point(name, chosen, run)
    return list(points.values())


def by_program(points: list[Point]) -> dict[Run, list[Point]]:
    """The points by what they compile to, in the order in which the programs first appear."""
    groups: dict[Run, list[Point]] = {}
    for point in points:
        groups.setdefault(static_part(point.run), []).append(point)
    return groups


def program_id(shown: Run) -> str:
    """A name for a program: its method, and a hash of everything that it depends on."""
    return point_id(shown, {"attention": shown.attention})


def program_label(shown: Run, axes: Axes) -> str:
    """The method, without the fields that have their defaults, and the values of the axes that are no column."""
    others = [name for name in axes.names if name != "attention" and name not in COLUMNS]
    values = [f"{name}={to_dict(look_up(shown, name))}" for name in others if not name.startswith("attention.")]
    method = shown.attention
    set_fields = [f for f in dataclasses.fields(method) if getattr(method, f.name) != f.default]
    arguments = ", ".join(f"{f.name}={getattr(method, f.name)!r}" for f in set_fields)
    return ", ".join([f"{type(method).__name__}({arguments})", *values])


def to_dict_of(point: Mapping[str, Any]) -> dict[str, Any]:
    """The axes of a point as plain JSON values."""
    return {name: to_dict(value) for name, value in point.items()}


def applied(run: Run, point: Mapping[str, Any]) -> Run:
    """The run with the values of a point; a path's parents are set before it."""
    for name in sorted(point, key=lambda name: name.count(".")):
        run = replaced(run, name, point[name])
    return run


def static_part(run: Run) -> Run:
    """What a compiled step depends on: the run with its traced fields, and its place on disk, at their defaults.

    Whether there is a soft cap is static, its value is not.
    """
    capped = None if run.soft_cap is None else 1.0
    return dataclasses.replace(_without(run, (*TRACED, *UNSWEPT)), soft_cap=capped)


def shown_part(run: Run) -> Run:
    """What tables and figures show as one program: the run without its columns, and its place on disk."""
    return _without(run, (*COLUMNS, *UNSWEPT))


def _without(run: Run, names: tuple[str, ...]) -> Run:
    default = Run()
    for name in names:
        run = replaced(run, name, look_up(default, name))
    return run


def point_id(run: Run, point: Mapping[str, Any]) -> str:
    """A file name for a point: its axes in words, and a hash of its whole configuration, place on disk apart."""
    config = {name: value for name, value in to_dict(run).items() if name not in UNSWEPT}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:10]
    words = "-".join(_word(name, value) for name, value in point.items())
    return f"{re.sub(r'[^A-Za-z0-9._=-]+', '_', words)[:100]}-{digest}"


def _word(name: str, value: Any) -> str:
    if isinstance(value, attention.Method):
        return re.sub(r"\W+", "_", repr(value)).strip("_").lower()
    number = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f"{name.rpartition('.')[2]}={number}"
