"""Sweeps as products and zips of named axes. An axis is a dotted path of `Run` with the values that it takes."""

import ast
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.paths import checked_value, known_path


@dataclasses.dataclass(frozen=True)
class Axes:
    """The points of a sweep, in the order in which they run: for each, the values of its axes by name."""

    points: tuple[Mapping[str, Any], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The swept paths of `Run`, in the order in which they were named."""
        return tuple(self.points[0])

    def values(self, name: str) -> list[Any]:
        """The values that the axis takes, each once, in the order in which they appear."""
        return list(dict.fromkeys(point[name] for point in self.points))


def axis(name: str, values: Iterable[Any]) -> Axes:
    """One axis, for names that are no Python identifier: `axis("optimizer.learning_rate", [1e-3, 3e-3])`.

    Raises:
        ValueError: the axis is unknown, or it has no value, or one twice, or one of the wrong type.
    """
    name = known_path(name)
    values = [checked_value(name, value) for value in values]
    if not values:
        raise ValueError(f"axis {name!r} has no values: expected at least one")
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"axis {name!r} takes {value!r} twice: name each value once")
    return Axes(tuple({name: value} for value in values))


def product(*parts: Axes, **axes: Iterable[Any]) -> Axes:
    """Every combination of the parts; the last one varies fastest.

    Example:
        >>> len(product(zipped(scale=[0.1, 0.2], temperature=[1.0, 2.0]), seed=[0, 1, 2]).points)
        6
    """
    joined = _disjoint(parts, axes)
    return Axes(tuple(_merged(chosen) for chosen in itertools.product(*(part.points for part in joined))))


def zipped(*parts: Axes, **axes: Iterable[Any]) -> Axes:
    """The first points of all parts together, then the second ones, and so on.

    Raises:
        ValueError: the parts have different lengths.
    """
    joined = _disjoint(parts, axes)
    lengths = {", ".join(part.names): len(part.points) for part in joined}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"zipped axes have different lengths: {lengths}")
    return Axes(tuple(_merged(chosen) for chosen in zip(*(part.points for part in joined), strict=True)))


def either(*parts: Axes) -> Axes:
    """The points of all parts, one part after the other.

    Raises:
        ValueError: the parts have different axes.
    """
    named = list(dict.fromkeys(part.names for part in parts))
    if len(named) != 1:
        raise ValueError(f"parts have different axes: {named}; expected the same ones in the same order")
    return Axes(tuple(point for part in parts for point in part.points))


def parse_axis(text: str) -> Axes:
    """The axis written `temperature=0.5,1,2` or `attention=Exact,TopK(k=16)`. Nothing is evaluated.

    Raises:
        ValueError: this is no such text, or `axis` refuses it.
    """
    name, equals, listed = text.partition("=")
    try:
        items = ast.parse(f"[{listed}]", mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"axis is {text!r}: expected NAME=VALUE,VALUE,... such as temperature=0.5,1,2") from error
    if not equals or not isinstance(items, ast.List):
        raise ValueError(f"axis is {text!r}: expected NAME=VALUE,VALUE,... such as temperature=0.5,1,2")
    return axis(name.strip(), [_literal(item) for item in items.elts])


def _literal(item: ast.expr) -> Any:
    try:
        return ast.literal_eval(item)
    except ValueError:
        return ast.unparse(item)  # a method's expression or a bare word


def _disjoint(parts: tuple[Axes, ...], axes: Mapping[str, Iterable[Any]]) -> list[Axes]:
    everything = [*parts, *(axis(name, values) for name, values in axes.items())]
    names = [name for part in everything for name in part.names]
    if not names:
        raise ValueError("a sweep has no axes: expected at least one, such as temperature=[0.5, 1.0]")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"axis {name!r} is named twice: expected each axis in one part")
    return everything


def _merged(points: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for point in points for name, value in point.items()}
