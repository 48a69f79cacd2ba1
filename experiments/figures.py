"""The figures of a sweep, each a function from its results to a matplotlib figure; its docstring is the caption."""

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from experiments.drawing import COLUMNS, INK, beta_axis, beta_colours, legible, level, look, panels, power, wrapped
from experiments.metrics import SHOWN
from experiments.summary import Results, by_beta, cells, final, grouped, labels, measured, points_of, unit


def loss_over_scale_and_temperature(results: Results) -> Figure:
    """Validation loss after the last step: scale down, temperature across, one panel a method. \
Cells on a rising diagonal share beta = scale / temperature."""
    found = {key: cells(results, key) for key in labels(results)}
    losses = [loss.mean for grid in found.values() for loss in grid.values() if not math.isnan(loss.mean)] or [0.0]
    colours = ScalarMappable(Normalize(min(losses), max(losses)), mpl.colormaps["cividis"])
    figure, grid = panels(len(found))
    for index, (axes, (key, losses_of)) in enumerate(zip(grid, found.items(), strict=True)):
        _heat_map(axes, losses_of, colours)
        axes.set_title(wrapped(labels(results)[key]))
        axes.set_ylabel("" if index % COLUMNS else "scale")
    figure.colorbar(colours, ax=grid, label=f"validation loss (nats / {unit(results)})", shrink=0.85)
    return figure


def _heat_map(axes: Axes, losses: dict[tuple[float, float], Any], colours: ScalarMappable) -> None:
    scales = sorted({scale for scale, _ in losses}, reverse=True)
    temperatures = sorted({temperature for _, temperature in losses})
    table = np.full((len(scales), len(temperatures)), np.nan)
    for (scale, temperature), loss in losses.items():
        table[scales.index(scale), temperatures.index(temperature)] = loss.mean
    paper = colours.to_rgba(table)
    paper[np.isnan(table)] = 0
    axes.pcolormesh(paper, edgecolors="face")
    axes.invert_yaxis()
    for (row, column), number in np.ndenumerate(table):
        if (scales[row], temperatures[column]) in losses:
            text, ink = ("diverged", INK) if math.isnan(number) else (f"{number:.3f}", legible(colours.to_rgba(number)))
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks(np.arange(len(temperatures)) + 0.5, [power(x) for x in temperatures])
    axes.set_yticks(np.arange(len(scales)) + 0.5, [power(x) for x in scales])
    axes.set_xlabel("temperature")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def loss_over_beta(results: Results) -> Figure:
    """Validation loss after the last step against beta = scale / temperature, the one number that plain softmax \
knows of either. Bars span the seeds."""
    figure = Figure()
    axes = figure.subplots()
    betas: list[float] = []
    for index, (key, label) in enumerate(labels(results).items()):
        losses = by_beta(results, key)
        shown = sorted(beta for beta in losses if beta > 0)
        means = [losses[beta].mean for beta in shown]
        reach = [[losses[b].mean - losses[b].low for b in shown], [losses[b].high - losses[b].mean for b in shown]]
        # Methods that coincide would hide each other: earlier ones are drawn larger, later ones on top of them.
        size = 11 - 7 * index / max(len(labels(results)) - 1, 1)
        colour, marker = look(index)
        spans = reach if np.any(reach) else None
        bars = axes.errorbar(shown, means, yerr=spans, label=label, capsize=3, color=colour, marker=marker)
        bars[0].set(markersize=size, linewidth=size / 4)
        betas += shown
    beta_axis(axes, betas)
    axes.set_ylabel(f"validation loss (nats / {unit(results)})")
    axes.legend()
    return figure


def learning_curves(results: Results) -> Figure:
    """Validation loss during training, one line a point, coloured by beta. Dashed: the entropy of single bytes, \
what a model that ignores the context reaches. The untrained model's loss is above the frame."""
    colours, norm = beta_colours(results)
    figure, grid = panels(len(labels(results)), sharey=True)
    for axes, (key, label) in zip(grid, labels(results).items(), strict=True):
        for point in points_of(results, key):
            steps = [evaluation["step"] for evaluation in point["evaluations"]]
            losses = [math.nan if x["loss"] is None else x["loss"] for x in point["evaluations"]]
            colour = colours(norm(math.log2(point["beta"]))) if point["beta"] > 0 else INK
            axes.plot(steps, losses, color=colour, marker=".", linewidth=1.2)
        unigram = results["programs"][key]["corpus"].get("unigram_entropy")
        if unigram is not None:
            level(axes, unigram, "--", "entropy of single bytes")
        axes.set_title(wrapped(label))
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, color="#888888")
    grid[0].set_ylabel(f"validation loss (nats / {unit(results)})")
    grid[0].set_ylim(top=_top_of_curves(results))
    ticks = FuncFormatter(lambda exponent, _: power(2.0**exponent))
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=grid, shrink=0.85, format=ticks)
    bar.set_ticks(sorted({math.log2(point["beta"]) for point in results["points"] if point["beta"] > 0}))
    bar.set_label(r"$\beta$ = scale / temperature")
    return figure


def _top_of_curves(results: Results) -> float | None:
    """A little above all that follows the untrained model, so that its loss does not flatten the rest."""
    later = [x["loss"] for point in results["points"] for x in point["evaluations"][1:] if x["loss"] is not None]
    unigram = [program["corpus"].get("unigram_entropy", 0.0) for program in results["programs"].values()]
    low, high = min(later, default=0.0), max([*later, *unigram], default=0.0)
    return high + 0.08 * (high - low) if later else None


def entropy_over_beta(results: Results) -> Figure:
    """Entropy of softmax attention in each head after training, mean over queries (nats), one line a head. Dotted: \
attention spread evenly over the visible keys."""
    figure, grid = panels(len(labels(results)), sharey=True)
    layers = 0
    for axes, (key, label) in zip(grid, labels(results).items(), strict=True):
        groups = grouped(points_of(results, key), lambda point: point["beta"])
        shown = [beta for beta in sorted(groups) if beta > 0 and not any(math.isnan(final(p)) for p in groups[beta])]
        if shown:
            heads = np.array([np.mean([_last_entropy(p) for p in groups[beta]], axis=0) for beta in shown])
            layers = max(layers, heads.shape[1])
            for layer in range(heads.shape[1]):
                colour, marker = look(layer)
                axes.plot(shown, heads[:, layer], color=colour, marker=marker, markersize=4, linewidth=1.1, alpha=0.85)
        context = results["programs"][key]["config"]["model"]["context"]
        uniform = np.mean(np.log(np.arange(1, context + 1)))
        level(axes, uniform, ":", "all keys alike")
        axes.set_title(wrapped(label))
        beta_axis(axes, list(groups))
    grid[0].set_ylabel("entropy (nats)")
    keys = [Line2D([], [], color=look(i)[0], marker=look(i)[1], label=f"layer {i}") for i in range(layers)]
    grid[0].legend(handles=keys, fontsize=8)
    return figure


def _last_entropy(point: Any) -> np.ndarray:
    return np.array(point["evaluations"][-1]["entropy"], np.float64)  # layers x heads; None becomes NaN


def attention_over_beta(results: Results) -> Figure:
    """What attention does after training: the mean over heads (for the largest logit the largest), one line a method. \
All but the monotonicity are those of softmax attention on the queries and keys that training with the method led to."""
    names = measured(results)
    figure, grid = panels(max(len(names), 1))
    for axes, name in zip(grid, names, strict=False):
        betas: list[float] = []
        for index, (key, label) in enumerate(labels(results).items()):
            numbers = by_beta(results, key, name)
            shown = sorted(beta for beta in numbers if beta > 0)
            colour, marker = look(index)
            means = [numbers[beta].mean for beta in shown]
            axes.plot(shown, means, label=wrapped(label), color=colour, marker=marker, markersize=4, linewidth=1.1)
            betas += shown
        axes.set_title(SHOWN[name][0])
        beta_axis(axes, betas)
    grid[0].legend(fontsize=7)
    return figure


def costs(results: Results) -> Figure:
    """Time a step (median of the points, dots: each point), time to compile, and temporary memory of a training \
step."""
    figure, grid = panels(3, width=3.3, height=0.9 + 0.32 * len(labels(results)), sharey=True)
    names = [label.replace("\n", " ") for label in labels(results).values()]
    for row, (key, program) in enumerate(results["programs"].items()):
        colour, _ = look(row)
        steps = [1e3 * p["timings"]["seconds_per_step"] for p in points_of(results, key)]
        grid[0].barh(row, np.median(steps) if steps else 0.0, color=colour, alpha=0.85)
        grid[0].plot(steps, [row] * len(steps), linestyle="", marker="|", color=INK, markersize=6)
        grid[1].barh(row, program["timings"]["compile_seconds"], color=colour, alpha=0.85)
        grid[2].barh(row, program["memory"]["temporary_bytes"] / 2**20, color=colour, alpha=0.85)
    for axes, label in zip(grid, ("time per step (ms)", "compile time (s)", "temporary memory (MiB)"), strict=True):
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.25, color="#888888")
    grid[0].set_yticks(range(len(names)), [wrapped(name) for name in names])
    grid[0].invert_yaxis()
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "loss": loss_over_scale_and_temperature,
    "loss_over_beta": loss_over_beta,
    "learning_curves": learning_curves,
    "entropy": entropy_over_beta,
    "attention": attention_over_beta,
    "costs": costs,
}
