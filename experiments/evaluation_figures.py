"""What other methods and temperatures cost a trained model, as a figure and as a table."""

import itertools
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from experiments.drawing import look, panels, wrapped


def figure(rows: list[dict[str, Any]]) -> Figure:
    """The change of the loss over the temperature, a line a method, a panel a length."""
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    drawing, axes = panels(len(contexts), sharey=True)
    for panel, context in zip(axes, contexts, strict=True):
        for index, name in enumerate(names):
            line = [row for row in rows if row["method"] == name and row["context"] == context]
            line.sort(key=lambda row: row["temperature"])
            colour, marker = look(index)
            keys = ("temperature", "change", "standard_error")
            factors, changes, errors = ([row[key] for row in line] for key in keys)
            panel.errorbar(factors, changes, errors, color=colour, marker=marker, capsize=2, label=wrapped(name))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
        panel.set_xlabel("temperature / that of the training")
        panel.set_title(f"{context} tokens")
        panel.grid(alpha=0.25, color="#888888")
    axes[0].set_ylabel("change of the held-out loss\n(nats per token)")
    handles, names = axes[0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), fontsize="small")
    return drawing


def table(rows: list[dict[str, Any]]) -> Table:
    """For each method and length the loss at the run's temperature, the best one, and where that is."""
    shown = Table("method", "tokens", "loss at 1", "best loss", "at temperature", "change of the best")
    for (name, context), group in itertools.groupby(rows, key=lambda row: (row["method"], row["context"])):
        line = list(group)
        best = min(line, key=lambda row: row["loss"])
        same = next((f"{row['loss']:.4f}" for row in line if row["temperature"] == 1), "-")
        change = f"{best['change']:+.4f} ± {best['standard_error']:.4f}"
        shown.add_row(name, str(context), same, f"{best['loss']:.4f}", f"{best['temperature']:g}", change)
    return shown
