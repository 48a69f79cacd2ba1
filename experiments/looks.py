"""How methods look in figures with many: a family has a colour and a column of the legend, its members have markers."""

import re
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.drawing import COLOURS, INK, MARKERS

FAMILIES = {
    "keys by score": ("TopK", "BlockTopK", "Hashed", "Sampled"),
    "keys by place": ("SlidingWindow", "LocalChunked"),
    "within a tolerance": ("Certified",),
    "estimates of the exponential": ("Performer", "Taylor", "Nystrom"),
    "kernels of their own": ("LinearElu", "CosFormer", "Hedgehog"),
}
COLOUR = dict(zip(FAMILIES, (COLOURS[0], COLOURS[5], INK, COLOURS[1], COLOURS[2]), strict=True))
OTHERS = "others"


def class_of(label: str) -> str:
    """The name that a label begins with."""
    return re.split(r"\W", label, maxsplit=1)[0]


def family_of(label: str) -> str:
    """The family of a label that begins with the name of a class; methods from elsewhere are one of their own."""
    name = class_of(label)
    return next((family for family, members in FAMILIES.items() if name in members), OTHERS)


def look_of(label: str) -> dict[str, Any]:
    """Colour and marker of a label that begins with the name of a class."""
    family, name = family_of(label), class_of(label)
    place = FAMILIES[family].index(name) if family in FAMILIES else 0
    return {"color": COLOUR.get(family, COLOURS[3]), "marker": MARKERS[place]}


def legend_by_family(figure: Figure, panels: Iterable[Axes], **options: Any) -> None:
    """The lines of all panels below them, a column for each family."""
    found = {name: line for panel in panels for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    columns: list[list[tuple[Any, str]]] = []
    for family in (*FAMILIES, OTHERS):
        if members := sorted(name for name in found if family_of(name) == family):
            columns.append([(Line2D([], [], linestyle="none"), f"$\\bf{{{family.replace(' ', '~')}}}$")])
            columns[-1] += [(found[name], name) for name in members]
    height = max(map(len, columns), default=0)
    nothing = (Line2D([], [], linestyle="none"), "")
    entries = [entry for column in columns for entry in column + [nothing] * (height - len(column))]
    if entries:
        lines, names = zip(*entries, strict=True)
        options = {"loc": "outside lower center", "frameon": False, "fontsize": 9} | options
        figure.legend(lines, names, ncols=len(columns), **options)
