"""The points of a sweep as runs: what each one is, what it is called, and which of them share a program."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import attention
from experiments.config import Run, to_dict
from experiments.paths import UNSWEPT, look_up, replaced

TRACED = ("scale", "temperature", "optimizer.learning_rate", "seed")
"""Axes whose values a compiled step takes as arguments: they never cost another compilation."""


def applied(run: Run, point: Mapping[str, Any]) -> Run:
    """The run with the values of a point; a path's parents are set before it."""
    for name in sorted(point, key=lambda name: name.count(".")):
        run = replaced(run, name, point[name])
    return run


def static_part(run: Run) -> Run:
    """What a compiled step depends on: the run with its traced fields, and its place on disk, at their defaults."""
    default = Run()
    for name in (*TRACED, *UNSWEPT):
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
