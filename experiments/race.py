"""A race: one cell measured, and all of them as a figure and as a table."""

from typing import Any

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.table import Table

from experiments.contestants import Cell, Contestant, matrix_size
from experiments.drawing import COLOURS, power, wrapped
from experiments.timing import interleaved, ratios, spread

LOOKS = {
    "Chunked": (COLOURS[2], "^"),
    "jax.nn": (COLOURS[1], "s"),
    "PyTorch": (COLOURS[0], "o"),
    "PyTorch, our layout": (COLOURS[5], "v"),
}
LINES = ("-", "--", ":", "-.")


def raced(cell: Cell, contestants: dict[str, Contestant], mine: str, rounds: int, limit: float) -> dict[str, Any]:
    """Times, ratios to `mine`, rates and temporaries of every contestant in one cell."""
    seconds = interleaved({name: one.call for name, one in contestants.items()}, rounds, limit)
    operations = dict.fromkeys(contestants, cell.operations) | {"matrix product": 2.0 * matrix_size() ** 3}
    rates = {name: spread([operations[name] / second / 1e9 for second in times]) for name, times in seconds.items()}
    result: dict[str, Any] = {
        "cell": cell._asdict(),
        "label": cell.label,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "gigaflops": rates,
        "slower_than_ours": ratios(seconds, mine),
        "temporaries": {name: one.temporaries for name, one in contestants.items()},
    }
    result["slower_than_ours"].pop("matrix product", None)  # another amount of work
    if "matrix product" in seconds:
        own, theirs = ([operations[name] / second for second in seconds[name]] for name in (mine, "matrix product"))
        result["share_of_matrix_product"] = spread([a / b for a, b in zip(own, theirs, strict=True)])
    return result


def figure(results: list[dict[str, Any]], mine: str) -> Figure:
    """How many times slower than ours each contestant is, with the quartiles: over the length, or as bars if there is \
one length alone."""
    lengths = [{result["cell"]["length"] for result in cells} for cells in _by_label(results).values()]
    with mpl.rc_context({"font.size": 10}):
        return _bars(results, mine) if max(map(len, lengths)) == 1 else _lines(results, mine)


def _by_label(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    labels = dict.fromkeys(result["label"] for result in results)
    return {label: [result for result in results if result["label"] == label] for label in labels}


def _lines(results: list[dict[str, Any]], mine: str) -> Figure:
    groups, names = _by_label(results), sorted(_contestants(results, "slower_than_ours"), key=_by_size)
    drawing = Figure(figsize=(2.9 * len(groups) + 0.8, 4.2), layout="constrained")
    panels = drawing.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, (label, cells) in zip(panels, groups.items(), strict=True):
        for name in names:
            those = [result for result in cells if name in result["slower_than_ours"]]
            if those:
                lengths = [result["cell"]["length"] for result in those]
                middle, reach = _medians([result["slower_than_ours"][name] for result in those])
                panel.errorbar(lengths, middle, reach, label=name, capsize=2, **_look(name, names))
        panel.axhline(1, color="#555555", linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        ticks = sorted({result["cell"]["length"] for result in cells})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 if len(ticks) > 3 else 0)
        panel.set_title(wrapped(label), fontsize=10)
        panel.set_xlabel("length (tokens)")
        panel.grid(alpha=0.25, color="#888888")
    panels[0].set_ylabel(f"time / time of {mine} (ratio)")
    panels[0].set_yscale("log", base=2)
    ratio_axis(panels[0].yaxis)
    found = {name: line for panel in panels for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    columns = len({name.partition(" x ")[0] for name in found if " x " in name}) or min(len(found), 2 * len(panels))
    drawing.legend(found.values(), found, loc="outside lower center", ncols=columns, frameon=False)
    return drawing


def _by_size(name: str) -> tuple[int, ...]:
    """Pairs of sizes in their order, and others, which come first, in theirs."""
    return tuple(int(x) for x in name.split(" x ")) if name.replace(" x ", "").isdecimal() else ()


def _bars(results: list[dict[str, Any]], mine: str) -> Figure:
    """One panel below the other, with a bar from 1 for each contestant."""
    heights = [len(result["slower_than_ours"]) for result in results]
    drawing = Figure(figsize=(8.6, 0.36 * sum(heights) + 0.5 * len(results) + 0.8), layout="constrained")
    panels = drawing.subplots(len(results), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, result in zip(panels, results, strict=True):
        found = result["slower_than_ours"]
        middle, reach = _medians(list(found.values()))
        colours = [COLOURS[0] if ratio < 1 else COLOURS[1] for ratio in middle]
        error = {"capsize": 3, "ecolor": "#555555"}
        bars = panel.barh(list(found), [x - 1 for x in middle], left=1, xerr=reach, color=colours, error_kw=error)
        panel.bar_label(bars, [f" {ratio:.3g} " for ratio in middle], padding=4)
        panel.axvline(1, color="#555555", linewidth=1)
        panel.invert_yaxis()
        panel.set_title(f"{result['label']}, {result['cell']['length']:,} tokens", fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_xscale("log", base=2)
    panels[0].margins(x=0.2)
    ratio_axis(panels[-1].xaxis)
    panels[-1].set_xlabel(f"time / time of {mine} (ratio), blue where less")
    return drawing


def _medians(ratios: list[dict[str, float]]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Medians, and how far the quartiles lie below and above them."""
    below = [ratio["median"] - ratio["lower_quartile"] for ratio in ratios]
    above = [ratio["upper_quartile"] - ratio["median"] for ratio in ratios]
    return [ratio["median"] for ratio in ratios], (below, above)


def _look(name: str, names: list[str]) -> dict[str, Any]:
    """The look of a contestant; pairs of sizes have a colour for the first and a line for the second."""
    if name in LOOKS:
        colour, marker = LOOKS[name]
        return {"color": colour, "marker": marker}
    if pair := _by_size(name):
        row, column = (sorted({_by_size(x)[end] for x in names if _by_size(x)}).index(pair[end]) for end in (0, 1))
        return {"color": COLOURS[row % len(COLOURS)], "marker": "os^Dv"[column % 5], "linestyle": LINES[column % 4]}
    place = [x for x in names if x not in LOOKS].index(name)
    others = (
        [x for x in COLOURS if x not in {colour for colour, _ in LOOKS.values()}]
        if set(names) & set(LOOKS)
        else COLOURS
    )
    return {
        "color": others[place % len(others)],
        "marker": "DPX<>*"[place % 6],
        "linestyle": LINES[place // len(others) % 4],
    }


def ratio_axis(axis: Axis) -> None:
    """A logarithmic axis of ratios with at least three ticks, however small its range."""
    low, high = axis.get_view_interval()
    ticks = [2.0**i for i in range(-12, 13) if low <= 2.0**i <= high]
    if len(ticks) > 8:
        ticks = ticks[:: -(-len(ticks) // 8)]
    if len(ticks) < 4:
        ticks = [x for x in (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if low <= x <= high] or ticks
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda ratio, _: power(ratio)))
    axis.set_minor_locator(NullLocator())


def _contestants(results: list[dict[str, Any]], quantity: str) -> list[str]:
    """All who raced anywhere, in their order."""
    return list(dict.fromkeys(name for result in results for name in result[quantity]))


def table(results: list[dict[str, Any]], mine: str) -> Table:
    """The same numbers for a terminal."""
    names = _contestants(results, "seconds")
    shown = Table("cell", "T", *(f"{name}, ms" for name in names), "temporaries, MiB", title="medians")
    for result in results:
        seconds = result["seconds"]
        times = (f"{1e3 * seconds[name]['median']:.1f}" if name in seconds else "-" for name in names)
        room = result["temporaries"][mine]
        shown.add_row(
            result["label"], str(result["cell"]["length"]), *times, "?" if room is None else f"{room / 2**20:.1f}"
        )
    return shown
