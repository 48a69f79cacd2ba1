"""The error of random features over their number: every kind and coupling, measured and in closed form."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attention
from attention.inputs import prepare
from attention.linear.couplings import Coupling, gaussian_rows
from attention.linear.kernel_maps import Kind
from attention.linear.random_features import best_ratio
from attention.linear.theory import expected_kernel, relative_variance
from experiments.drawing import look

LABELS = {"relu": "relu (its own kernel)"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Relative error of the kernel estimate over the number of features; of `relu`, of its own kernel."""

    kinds: tuple[Kind, ...] = get_args(Kind)
    """Kinds of features."""
    couplings: tuple[Coupling, ...] = get_args(Coupling)
    """Couplings of the rows of W."""
    numbers: tuple[int, ...] = (16, 64, 256, 1024)
    """Features, M, even."""
    temperatures: tuple[float, ...] = (2.0, 4.0, 8.0)
    """At the scale 1 / sqrt(H)."""
    head_size: int = 64
    """Size of a head, H."""
    draws: int = 400
    """Projections that each number is the mean of."""
    pairs: int = 32
    """Queries and keys whose median is shown."""
    out: Path = Path("runs/benchmark/features")
    """Folder for results.json, features.svg and features.png."""

    def measured(self) -> list[dict[str, Any]]:
        sample, tokens = (activations(seed, n, self.head_size) for seed, n in ((1, 4096), (2, self.pairs)))
        axes = list(itertools.product(self.couplings, self.kinds, self.numbers))
        console = Console(stderr=True)
        steps = track(axes, "measuring", console=console, disable=not console.is_terminal)
        return [cell for step in steps for cell in self._cells(*step, sample, tokens)]

    def _cells(self, coupling: Coupling, kind: Kind, M: int, sample, tokens) -> list[dict[str, Any]]:
        method = attention.Performer(kind=kind, features=M)
        params = method.init(jax.random.key(0), num_heads=1, head_dim=self.head_size)
        if kind in ("optimal", "data_dependent"):
            params = method.fitted(params, *(jnp.asarray(x[None, :, None], jnp.float32) for x in sample))
        keys = jax.random.split(jax.random.key(1), self.draws)
        projections = drawn(keys, coupling, (method.rows, self.head_size))
        cells = []
        for temperature in self.temperatures:
            found = estimates(method, params, projections, *(jnp.asarray(x, jnp.float32) for x in tokens), temperature)
            x, y, ratio, factor = coordinates(kind, params, *tokens, 1 / math.sqrt(self.head_size) / temperature)
            truth = expected_kernel(kind, x, y) * factor
            error = np.sqrt(np.mean((np.asarray(found, np.float64) / truth - 1) ** 2, axis=0))
            closed = None
            if coupling == "iid" or kind not in ("relu", "data_dependent"):
                variance = relative_variance(kind, x, y, features=M, coupling=coupling, ratio=ratio)
                closed = float(np.median(np.sqrt(variance)))
            square = ((x + y) ** 2).sum(-1)
            testable = bool(np.median(square) <= math.log(method.rows))
            found = {"error": float(np.median(error)), "closed_form": closed, "testable": testable}
            cells.append({"coupling": coupling, "kind": kind, "features": M, "temperature": temperature} | found)
        return cells


def activations(seed: int, n: int, H: int) -> np.ndarray:
    """Queries and keys `2 n H` of mean square H, with means, and variances that fall as 1 / index along their axes."""
    spectrum = np.arange(1, H + 1) ** -0.5
    fixed = np.random.default_rng(0)
    axes, means = np.linalg.qr(fixed.standard_normal((2, H, H)))[0], fixed.standard_normal((2, 1, H)) / 4
    tokens = (np.random.default_rng(seed).standard_normal((2, n, H)) * spectrum) @ axes
    return means + tokens * math.sqrt(15 / 16 * H / (spectrum**2).sum())


@functools.partial(jax.jit, static_argnames=("coupling", "shape"))
def drawn(keys, coupling: Coupling, shape: tuple[int, int]):
    """Projections `draws m H`."""
    return lax.map(lambda key: gaussian_rows(coupling, key, shape), keys)


@functools.partial(jax.jit, static_argnames="method")
def estimates(method: attention.Performer, params, projections, query, key, temperature):
    """phi(q).phi(k) for every projection and pair, `draws P`."""

    def one(projection):
        constants = {**params.constants, "projection": projection}
        operands = (x[None, :, None] for x in (query, key, key))
        inputs = prepare(method, *operands, params=params._replace(constants=constants), temperature=temperature)
        maps, places = method.feature_map(inputs), jnp.arange(query.shape[0])[None]
        of_query, of_key = maps.query(inputs.query, places), maps.key(inputs.key, places)
        scale = jnp.exp(of_query.log_scale + of_key.log_scale)
        return ((of_query.features * of_key.features).sum(-1) * scale).reshape(-1)

    return lax.map(one, projections)


def coordinates(kind: Kind, params, query, key, beta: float):
    """Both tokens, the ratio, and the factor of the mean of phi(x).phi(y), as the kind has them at this beta."""
    root = math.sqrt(beta)
    constants = {name: np.asarray(value[0], np.float64) for name, value in params.constants.items()}
    if kind == "optimal":
        return query * root, key * root, best_ratio(beta * constants["spread"][None]), 1.0
    if kind != "data_dependent":
        return query * root, key * root, 1.0, 1.0
    d, c = constants["query_mean"], constants["key_mean"]
    x, y = (query - d) @ constants["query_map"].T * root, (key - c) @ constants["key_map"].T * root
    return x, y, best_ratio(beta * constants["spread"]), np.exp(beta * (query @ c + (key - c) @ d))


def figure(results: list[dict[str, Any]]) -> Figure:
    """A row a coupling, a column a temperature: closed forms as lines, measurements as markers."""
    couplings, temperatures, kinds = (
        list(dict.fromkeys(cell[axis] for cell in results)) for axis in ("coupling", "temperature", "kind")
    )
    drawing = Figure(figsize=(3.2 * len(temperatures) + 1.6, 2.6 * len(couplings) + 0.6), layout="constrained")
    grid = drawing.subplots(len(couplings), len(temperatures), sharex=True, sharey=True, squeeze=False)
    for (i, coupling), (j, temperature) in itertools.product(enumerate(couplings), enumerate(temperatures)):
        panel = grid[i][j]
        for index, kind in enumerate(kinds):
            cells = [
                c for c in results if (c["coupling"], c["temperature"], c["kind"]) == (coupling, temperature, kind)
            ]
            _draw(panel, cells, *look(index))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(f"{coupling}, temperature {temperature:g}", fontsize=10)
        panel.grid(alpha=0.25)
        if j == 0:
            panel.set_ylabel("relative error of e^(q.k)")
        if i == len(couplings) - 1:
            panel.set_xlabel("features M")
    drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return drawing


def _draw(panel, cells: list[dict[str, Any]], colour: str, marker: str) -> None:
    closed = [cell for cell in cells if cell["closed_form"] is not None]
    panel.plot([c["features"] for c in closed], [c["closed_form"] for c in closed], color=colour, linewidth=1)
    panel.plot([], [], color=colour, marker=marker, label=LABELS.get(cells[0]["kind"], cells[0]["kind"]))
    for full in (True, False):  # hollow where |x + y|^2 > ln m: so few draws do not show the mean there
        those = [cell for cell in cells if cell["testable"] is full]
        fill = colour if full else "white"
        numbers, errors = [c["features"] for c in those], [c["error"] for c in those]
        panel.plot(numbers, errors, linestyle="none", marker=marker, color=colour, markerfacecolor=fill, markersize=5)


def table(results: list[dict[str, Any]]) -> Table:
    """Measured over closed form, for a terminal."""
    shown = Table("kind", "coupling", "T", "M", "error", "closed form", "testable", title="relative error, median pair")
    for c in results:
        closed = "-" if c["closed_form"] is None else f"{c['closed_form']:.3g}"
        row = (c["kind"], c["coupling"], f"{c['temperature']:g}", str(c["features"]), f"{c['error']:.3g}", closed)
        shown.add_row(*row, "yes" if c["testable"] else "no")
    return shown
