"""The error of every method over the temperature, at equal work, on random operands and on those of a trained model."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attention
from attention.method import METHODS, Method
from experiments.drawing import COLOURS, MARKERS
from experiments.operand_files import concatenated, load
from experiments.operands import Operands, normal, trained

# A colour a method: those of the other figures, and six between them.
PALETTE = (*COLOURS, "#5B2C83", "#7F7F7F", "#8C4A2F", "#1B1B1F", "#A6A000", "#B2182B")

FILLS = ("full", "none", "left")  # of the markers of one class's configurations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
    """Error against exact attention over the temperature, of every method at its largest budget within equal work."""

    lengths: tuple[int, ...] = (256, 4096)
    """Tokens of the random operands, T = S; one panel each."""
    temperatures: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    """Temperatures; beta is 1 / (sqrt(H) temperature)."""
    head_size: int = 64
    """Size of a head of the random operands, H; there is one head, with standard normal entries."""
    budget: float = 1.0
    """The most operations that a method may take, as a share of those of exact attention."""
    also: tuple[str, ...] = (
        "TopK(k=16)",
        "Performer(features=256, coupling='iid')",
        "Performer(features=1024, coupling='iid', kind='trigonometric')",
    )
    """Methods that are measured too, whatever work they take."""
    steps: int = 120
    """Steps that the language model is trained for, whose operands the last panel has; 0 leaves it out."""
    context: int = 1024
    """Tokens of the language model's sequences."""
    operands: tuple[Path, ...] = ()
    """Files of `python -m experiments.capture`; one panel each, after the others."""
    seed: int = 0
    """Draws operands, parameters and constants."""
    out: Path = Path("runs/benchmark/temperature")
    """Folder for results.json, temperature.svg and temperature.png."""

    def measured(self) -> list[dict[str, Any]]:
        found = [normal(T, self.head_size, self.seed) for T in self.lengths]
        if self.steps:
            found.append(trained(self.context, self.steps, self.seed))
        found += [concatenated(load(path)) for path in self.operands]
        also = tuple(attention.parse_method(expression) for expression in self.also)
        return [errors(operands, self.temperatures, self.budget, also, self.seed) for operands in found]


def errors(
    operands: Operands, temperatures: tuple[float, ...], budget: float, also: tuple[Method, ...] = (), seed: int = 0
) -> dict[str, Any]:
    """The error of every registered method that is not exact, at each temperature, and what its certificate says.

    Beside them the entropy of softmax as a share of the logarithm of the keys' number, and the mass of the 16 largest
    weights, means over rows and heads.
    """
    case = [jnp.asarray(x) for x in (operands.query, operands.key, operands.value)]
    exact = jax.jit(lambda t, *case: attend(attention.Chunked(), case, None, t, operands.causal)[0])
    truth = [np.asarray(exact(t, *case), np.float64) for t in temperatures]
    centred = np.asarray(operands.value, np.float64) - np.mean(operands.value, axis=1, keepdims=True, dtype=np.float64)
    radius = float(np.linalg.norm(centred, axis=-1).max())
    console = Console(stderr=True)
    chosen = dict(pair for cls in METHODS.values() if (pair := within(cls, operands, budget)))
    chosen |= {method: work(method, operands) for method in also}
    rows: dict[str, Any] = {}
    for method, share in track(chosen.items(), operands.name, console=console, disable=not console.is_terminal):
        heads, size = operands.query.shape[-2:]
        params = method.init(jax.random.key(seed), num_heads=heads, head_dim=size)
        call = jax.jit(lambda t, params, *case, method=method: attend(method, case, params, t, operands.causal))
        found = [call(t, params, *case) for t in temperatures]
        error = [np.asarray(output, np.float64) - exact for (output, _), exact in zip(found, truth, strict=True)]
        row = {
            "share_of_exact_operations": share,
            "relative_error": [
                float(np.linalg.norm(e) / np.linalg.norm(exact)) for e, exact in zip(error, truth, strict=True)
            ],
            "error_over_radius": [float(np.median(np.linalg.norm(e, axis=-1))) / radius for e in error],
        }
        if method.capabilities.certificate != "none":
            bounds = [np.asarray(bound, np.float64) / radius for _, bound in found]
            row["bound_over_radius"] = [float(np.median(bound)) for bound in bounds]
            row["largest_bound_over_radius"] = [float(bound.max()) for bound in bounds]
            row["rows_certified_to_0.1"] = [float((bound <= 0.1).mean()) for bound in bounds]
        rows[repr(method)] = row
    seen = jax.jit(lambda t, *case: attention.diagnostics(*case[:2], k=16, temperature=t, is_causal=operands.causal))
    sharpness = [seen(t, *case) for t in temperatures]
    return {
        "operands": operands.name,
        "shape": list(operands.query.shape),
        "temperatures": list(temperatures),
        "budget": budget,
        "radius": radius,
        "entropy_over_log": [float(x.entropy.mean()) / math.log(operands.key.shape[1]) for x in sharpness],
        "top_16_mass": [float(x.top_mass.mean()) for x in sharpness],
        "methods": rows,
    }


def attend(method: Method, case, params: Any, temperature, causal: bool) -> tuple[jax.Array, jax.Array]:
    """The output, and the bound on its error (NaN for a method without certificates)."""
    options: dict[str, Any] = {"params": params, "temperature": temperature, "is_causal": causal}
    if method.capabilities.certificate == "none":
        return attention.dot_product_attention(*case, method=method, **options), jnp.full((), jnp.nan)
    output, certificate = attention.certified_attention(*case, method=method, **options)
    return output, certificate.error_bound


def within(cls: type[Method], operands: Operands, budget: float) -> tuple[Method, float] | None:
    """The costliest configuration within the budget, of the default and its ladder; the cheapest if there is none.

    With its operations as a share of those of exact attention. None for exact methods, and for those that cannot take
    these operands.
    """
    can = cls.capabilities
    if can.exact or (operands.causal and not can.causal):
        return None
    shares = {method: work(method, operands) for method in (cls(), *cls().ladder(operands.key.shape[1]))}
    affordable = {method: share for method, share in shares.items() if share <= budget}
    if affordable:
        return max(affordable.items(), key=lambda pair: pair[1])
    return min(shares.items(), key=lambda pair: pair[1])


def work(method: Method, operands: Operands) -> float:
    """The operations of a method as a share of those of exact attention."""
    _, T, N, H = operands.query.shape
    S, sizes = operands.key.shape[1], {"num_heads": N, "head_dim": H, "is_causal": operands.causal}
    return method.cost(T, S, **sizes).flops / attention.Exact().cost(T, S, **sizes).flops


def figure(results: list[dict[str, Any]]) -> Figure:
    """Above, the error relative to the output's norm; below, median error (lines) and median bound (dotted), in radii \
of the values. Methods beyond the budget are dashed."""
    drawing = Figure(figsize=(6.2 * len(results), 10), layout="constrained")
    grid = drawing.subplots(2, len(results), squeeze=False, sharex="col")
    names = list(dict.fromkeys(name for result in results for name in result["methods"]))
    classes = list(dict.fromkeys(name.partition("(")[0] for name in names))
    for (above, below), result in zip(grid.T, results, strict=True):
        temperatures, drawn = result["temperatures"], []
        for name, row in result["methods"].items():
            place = classes.index(name.partition("(")[0])
            share = row["share_of_exact_operations"]
            style: Any = {
                "color": PALETTE[place % len(PALETTE)],
                "marker": MARKERS[place % len(MARKERS)],
                "markersize": 4,
                "fillstyle": FILLS[drawn.count(place) % len(FILLS)],
                "linestyle": "-" if share <= result["budget"] else "--",
            }
            drawn.append(place)
            above.plot(temperatures, row["relative_error"], label=f"{name}: {share:.2g}", **style)
            below.plot(temperatures, row["error_over_radius"], **style)
            if "bound_over_radius" in row:
                below.plot(temperatures, row["bound_over_radius"], **(style | {"linestyle": ":"}))
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}"))
            axes.grid(alpha=0.25)
        above.set_title(result["operands"], fontsize=10)
        above.set_ylabel("|error| / |exact output|")
        below.set_ylabel("median error (bound: dotted) / radius of the values")
        below.set_xlabel("temperature")
        below.legend(
            *above.get_legend_handles_labels(),
            title="operations of each method / those of exact attention",
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
    return drawing


def table(results: list[dict[str, Any]]) -> Table:
    """The relative errors for a terminal."""
    temperatures = results[0]["temperatures"]
    shown = Table("operands", "method", "work", *(f"T = {t:g}" for t in temperatures), title="relative error")
    for result in results:
        for name, row in result["methods"].items():
            numbers = (f"{error:.2g}" for error in row["relative_error"])
            shown.add_row(result["operands"], name, f"{row['share_of_exact_operations']:.2g}", *numbers)
    return shown
