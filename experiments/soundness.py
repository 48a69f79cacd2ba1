"""How near errors come to their bounds in drawn cases: what `make soundness` takes down, in a file and a figure."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.drawing import look
from experiments.records import written

OF = ("kind", "method", "problems", "dtype", "causal", "quantity")
"""What a case is of."""
TITLES = {"deterministic": "deterministic certificates", "rounding": "rounding of exact attention"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soundness:
    """The largest error over its bound of every method, over thousands of drawn cases."""

    out: Path
    """Folder for results.json, soundness.svg and soundness.png."""


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Rows have what `OF` names, and `ratios`: the error over its bound of each case, above 1 where that is broken."""
    found = cells(rows)
    written(Soundness(out=folder), found, {"soundness": figure(found)})


def cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same as one, in an order that does not depend on theirs."""
    together: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        together.setdefault(tuple(row[name] for name in OF), []).extend(row["ratios"])
    return [
        dict(zip(OF, of, strict=True))
        | {
            "cases": len(ratios),
            "violations": sum(ratio > 1 for ratio in ratios),
            "worst": max(ratios),
            "median": statistics.median(sorted(ratios)),
        }
        for of, ratios in sorted(together.items(), key=lambda item: tuple(map(str, item[0])))
    ]


def figure(results: list[dict[str, Any]]) -> Figure:
    """The worst ratio of every method and dtype, a panel a kind; what is right of 1 breaks its bound."""
    kinds = list(dict.fromkeys(cell["kind"] for cell in results))
    lines = {kind: list(dict.fromkeys(_line(cell) for cell in results if cell["kind"] == kind)) for kind in kinds}
    height = 0.24 * max(map(len, lines.values())) + 1.6
    drawing = Figure(figsize=(5.6 * len(kinds), height), layout="constrained")
    dtypes = sorted({cell["dtype"] for cell in results})
    for axes, kind in zip(drawing.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _panel(axes, [cell for cell in results if cell["kind"] == kind], lines[kind], dtypes)
        axes.set_title(TITLES.get(kind, kind))
    handles = {name: x for axes in drawing.axes for x, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawing.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    return drawing


def _panel(axes: Axes, results: list[dict[str, Any]], lines: list[str], dtypes: list[str]) -> None:
    for index, dtype in enumerate(dtypes):
        colour, marker = look(index)
        worst: dict[str, float] = {}
        for cell in results:
            if cell["dtype"] == dtype:
                worst[_line(cell)] = max(worst.get(_line(cell), 0), cell["worst"])
        axes.plot(list(worst.values()), [lines.index(line) for line in worst], marker, color=colour, label=dtype)
    axes.set_yticks(range(len(lines)), lines)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="#555555", linewidth=1, linestyle="--")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(axes.get_xlim()[0], 0.1), 2)
    axes.set_xlabel("worst error / bound")
    axes.grid(axis="y", alpha=0.25, color="#888888")


def _line(cell: dict[str, Any]) -> str:
    """What shares a line of the figure: causal and not, and of certificates' problems the length."""
    of = cell["problems"] if cell["kind"] == "deterministic" else cell["quantity"]
    return f"{cell['method']}: {of}"
