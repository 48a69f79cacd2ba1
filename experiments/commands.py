"""The command line of a run, from its configuration alone."""

import dataclasses
from typing import Any

from attention.method import METHODS
from experiments.config import Run
from experiments.paths import UNSWEPT, look_up, paths


def train_command(run: Run) -> list[str]:
    """The words that `experiments.train` reads as this run: every option that differs from its default.

    Example:
        >>> train_command(Run(steps=7, attention=attention.TopK(k=2)))[2:]
        ['experiments.train', '--steps', '7', 'attention:topk', '--attention.k', '2']
    """
    default, words = Run(), ["python", "-m", "experiments.train"]
    for name in (*UNSWEPT, *paths(run)):
        value = look_up(run, name)
        if name != "attention" and value != look_up(default, name):
            words += _option(name, value)
    if run.attention == default.attention:
        return words
    words.append(f"attention:{next(name for name, cls in METHODS.items() if cls is type(run.attention))}")
    for field in dataclasses.fields(run.attention):
        value = getattr(run.attention, field.name)
        if value != field.default:
            words += _option(f"attention.{field.name}", value)
    return words


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        *owner, field = name.split(".")
        return ["--" + ".".join([*owner, field if value else f"no-{field}"])]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *(x if isinstance(x, str) else repr(x) if isinstance(x, float) else str(x) for x in values)]
