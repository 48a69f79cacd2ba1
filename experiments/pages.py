"""What all pages share: their templates, and how these write numbers and documents."""

import math
import re
from pathlib import Path
from typing import Any

import jinja2

from experiments.drawing import power


def templates() -> jinja2.Environment:
    """The templates beside this file, which escape what they are given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": _number, "short": short, "signed": _signed, "mebibytes": _mebibytes}
    environment.filters |= {"spread": _spread}
    return environment


def flat(nested: dict[str, Any]) -> list[tuple[str, Any]]:
    """Facts, and facts of facts, by their names."""
    facts: list[tuple[str, Any]] = []
    for name, value in nested.items():
        facts += [(f"{name}: {key}", x) for key, x in value.items()] if isinstance(value, dict) else [(name, value)]
    return facts


def paragraphs(text: str) -> list[str]:
    """A document's paragraphs and list items, each on one line."""
    blocks = [item for block in text.split("\n\n") for item in re.split(r"\n(?=- )", block)]
    return [" ".join(block.split()) for block in blocks if block.strip()]


def _number(number: float, digits: int = 3) -> str:
    return "" if math.isnan(number) else f"{number:.{digits}f}"


def _spread(number: dict[str, float | None]) -> str:
    return "" if number["mean"] is None else f"{number['mean']:.4g} ± {number['deviation']:.2g}"


def short(number: float) -> str:
    """Five digits, or the fraction that a power of two is."""
    fraction = power(number) if number > 0 else "$"
    if "/" in fraction and "$" not in fraction:
        return fraction
    return "" if math.isnan(number) else f"{number:.5g}"


def _signed(number: float) -> str:
    return "?" if math.isnan(number) else f"{number:+.3f}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f}"
