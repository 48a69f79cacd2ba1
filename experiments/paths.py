"""Dotted paths of a configuration: which there are, what they hold, and how to set them."""

import dataclasses
import types
import typing
from typing import Any, Literal

import attention
from attention.registry import unknown
from experiments.config import Run

UNSWEPT = ("name", "folder")
"""Where a run is kept; it changes nothing that the run computes."""


def paths(config: Any, prefix: str = "") -> list[str]:
    """The dotted paths of a configuration that an axis may name."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, attention.Method):
            found += paths(value, f"{prefix}{field.name}.")
        elif prefix + field.name not in UNSWEPT:
            found.append(prefix + field.name)
    return found


def known_path(name: str) -> str:
    """The name, if it is a path of `Run`, or of a field of some method (`attention.k`).

    Raises:
        ValueError: it is not; the message gives the nearest that is.
    """
    known = paths(Run())
    of_methods = {f"attention.{f.name}" for cls in attention.METHODS.values() for f in dataclasses.fields(cls)}
    if name not in known and name not in of_methods:
        raise ValueError(unknown("axis", name, sorted({*known, *of_methods})))
    return name


def look_up(config: Any, name: str) -> Any:
    """The value at a dotted path."""
    for field in name.split("."):
        config = getattr(config, field)
    return config


def replaced(config: Any, name: str, value: Any) -> Any:
    """The configuration with another value at a dotted path.

    Raises:
        ValueError: there is no such path in this configuration; the message gives the nearest there is.
    """
    field, _, rest = name.partition(".")
    known = [field.name for field in dataclasses.fields(config)]
    if field not in known:
        raise ValueError(unknown(f"field of {type(config).__name__}", field, known))
    if rest:
        value = replaced(getattr(config, field), rest, value)
    return dataclasses.replace(config, **{field: value})


def checked_value(name: str, value: Any) -> Any:
    """The value in the type that the path holds: a method for its expression, a float for a whole number.

    Raises:
        ValueError: it is of another type.
    """
    if name == "attention" and isinstance(value, str):
        return attention.parse_method(value)
    if name.startswith("attention."):
        return value  # the method itself refuses what it cannot take
    *parents, field = name.split(".")
    owner = look_up(Run(), ".".join(parents)) if parents else Run()
    hint = attention.Method if name == "attention" else typing.get_type_hints(type(owner))[field]
    value = tuple(value) if isinstance(value, list) else value
    number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if number and _matches(0.5, hint) else _expect(name, value, hint)


def _expect(name: str, value: Any, hint: Any) -> Any:
    if not _matches(value, hint):
        raise ValueError(f"axis {name!r} takes {value!r}: expected {getattr(hint, '__name__', hint)}")
    return value


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, choice) for choice in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint in (None, type(None)):
        return value is None
    return isinstance(value, origin or hint) and not (isinstance(value, bool) and hint is int)
