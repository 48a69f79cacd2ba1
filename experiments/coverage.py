"""How often probabilistic certificates fail, over draws of the sample: on drawn inputs, adversarial ones among them,
and on what models attend with."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats

import attention
from attention.testing.oracle import oracle
from experiments.drawing import COLUMNS, look, panels, wrapped
from experiments.operand_files import load
from experiments.timing import spread

QUERIES = 4  # at the end of the keys
RUN = 16  # keys around a shared centre, and of a page
Problem = tuple[np.ndarray, np.ndarray, np.ndarray]
TOLERANCES = (0.1, 0.01, 0.001)  # of the largest distance of two values
OPTIONS: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """Failures of the certificates of Sampled over thousands of draws, and what the certificates are worth."""

    tokens: int = 1024
    """Keys, S; of the sample's 4 queries the first stands at S - 4."""
    head_size: int = 32
    """Size of a head, H."""
    samples: tuple[int, ...] = (64, 256)
    """Keys drawn, m."""
    heavy: tuple[int, ...] = (0, 8)
    """Pages of 16 keys that are kept for their bounds."""
    temperatures: tuple[float, ...] = (0.125, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Of the scores."""
    delta: float = 0.05
    """The probability of failure that is promised."""
    draws: int = 2048
    """Samples of each family and temperature."""
    operands: tuple[Path, ...] = ()
    """Files of `python -m experiments.capture`, whose layers are families too, by all heads of their first sequence;
    `tokens` at most of each."""
    out: Path = Path("runs/benchmark/coverage")
    """Folder for results.json, coverage.svg and coverage.png."""

    def measured(self) -> list[dict[str, Any]]:
        console = Console(stderr=True)
        problems = self._problems()
        axes = list(itertools.product(self.samples, self.heavy, problems, self.temperatures))
        return [
            self._counted(problems[axis[2]], *axis)
            for axis in track(axes, "drawing", console=console, disable=not console.is_terminal)
        ]

    def _problems(self) -> dict[str, Problem]:
        """Queries, keys and values of each family."""
        found = {family: problem(family, self.tokens, self.head_size) for family in FAMILIES}
        for path in self.operands:
            for depth, layer in enumerate(load(path)):
                query, key, value = (x[:1, : self.tokens] for x in (layer.query, layer.key, layer.value))
                found[f"{layer.name}, layer {depth}"] = query[:, -QUERIES:], key, value
        return found

    def _counted(self, operands: Problem, samples: int, heavy: int, family: str, temperature: float) -> dict[str, Any]:
        """Failures of the row that failed most often, whose draws are independent, with their interval of 95%."""
        sizes = {"samples": samples, "window": 16, "sinks": 4, "query_block": QUERIES, "heavy": heavy, "page": RUN}
        method = attention.Sampled(**sizes, delta=self.delta)
        found = drawn(operands, temperature, method, seed=1, draws=self.draws)
        failures = int((found.error > found.bound).sum(0).max())
        interval = stats.binomtest(failures, self.draws).proportion_ci(0.95, "exact")
        query, _, value = operands
        apart = np.repeat([farthest(x) for x in value[0].swapaxes(0, 1)], query.shape[2] // value.shape[2])
        return {
            "family": family,
            "samples": samples,
            "heavy": heavy,
            "temperature": temperature,
            "draws": self.draws,
            "failures": failures,
            "interval": [float(interval.low), float(interval.high)],
            "error": spread((found.error / apart).ravel()),
            "bound": spread((found.bound / apart).ravel()),
            "fires": {str(level): float(np.mean(found.bound <= level * apart)) for level in TOLERANCES},
        }


class Drawn(NamedTuple):
    """What draws of the sample give, in float64, and the weights of exact attention.

    Attributes:
        output: `D T N H`.
        error, bound, mass: `D T N`, the last an upper bound on the dropped mass.
        weights: `N T S`.
    """

    output: np.ndarray
    error: np.ndarray
    bound: np.ndarray
    mass: np.ndarray
    weights: np.ndarray


def drawn(operands, temperature: float, method: attention.Sampled, *, seed: int, draws: int, **segments) -> Drawn:
    """Draws the sample anew from so many seeds; segments are passed on under their names."""
    seeds = np.random.default_rng(seed).integers(2**32, size=(draws, 2), dtype=np.uint32)
    found = _attended(operands, seeds, np.float32(temperature), segments, method)
    output, bound, mass = (np.asarray(x, np.float64) for x in found)
    expected, weights = oracle(*operands, temperature=np.float32(temperature), **OPTIONS, **segments)
    return Drawn(output, np.linalg.norm(output - expected[0], axis=-1), bound, mass, weights[0])


@functools.partial(jax.jit, static_argnames="method")
def _attended(operands, seeds, temperature, segments, method: attention.Sampled):
    def one(seed):
        params = attention.Params(constants={"seed": seed})
        output, found = attention.certified_attention(
            *operands, method=method, params=params, temperature=temperature, **OPTIONS, **segments
        )
        return output[0], found.error_bound[0], found.dropped_mass[0]

    return jax.lax.map(one, seeds)


def farthest(value) -> float:
    """The largest distance of two rows, by their inner products."""
    value = np.asarray(value, np.float64)
    squares = np.square(value).sum(-1)
    return float(np.sqrt(np.max(squares[:, None] + squares[None] - 2 * value @ value.T)))


def problem(family: str, S: int, H: int, seed: int = 0) -> Problem:
    """Queries of 2 heads at the end of S keys, and their values: `1 T N H`, `1 S 1 H`, in float32."""
    rng = np.random.default_rng(seed)
    shapes = ((1, QUERIES, 2, H), (1, S, 1, H), (1, S, 1, H))
    query, key, value = (rng.standard_normal(shape, np.float32) for shape in shapes)
    FAMILIES[family](rng, key[0, :, 0], value[0, :, 0])
    return query, key, value


def _clustered(rng: np.random.Generator, key, value) -> None:
    for x in (key, value):
        x *= 0.3
        x += np.repeat(rng.standard_normal((-(-len(x) // RUN), x.shape[1]), np.float32), RUN, axis=0)[: len(x)]


def _power_law(rng: np.random.Generator, key, value) -> None:
    del rng, value
    key *= 3 * np.arange(1, key.shape[1] + 1, dtype=np.float32) ** -0.5


def _duplicated(rng: np.random.Generator, key, value) -> None:
    del value
    key[:] = key[rng.integers(4, size=len(key))]


def _huge_key(rng: np.random.Generator, key, value) -> None:
    token = rng.integers(10, len(key) - 30)  # where most samples miss it
    key[token] *= 20
    value[token] *= 3


def _huge_value(rng: np.random.Generator, key, value) -> None:
    del key
    value[rng.integers(10, len(value) - 30)] *= 1e4


def _shifted_end(rng: np.random.Generator, key, value) -> None:
    del rng, key
    value[3 * len(value) // 4 :] += 5


FAMILIES: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], None]] = {
    "iid": lambda *_: None,
    "clustered": _clustered,
    "power law": _power_law,
    "shifted end": _shifted_end,
    "duplicated keys": _duplicated,
    "huge key": _huge_key,
    "huge value": _huge_value,
}


def figure(results: list[dict[str, Any]]) -> Figure:
    """Median bound and error in units of the largest distance of two values, over temperature, a panel a family."""
    families = list(dict.fromkeys(x["family"] for x in results))
    drawing, axes = panels(len(families), sharex=True, sharey=True)
    drawing.set_layout_engine("constrained")
    for panel, family in zip(axes, families, strict=True):
        for index, (samples, heavy) in enumerate(dict.fromkeys((x["samples"], x["heavy"]) for x in results)):
            cells = [x for x in results if (x["family"], x["samples"], x["heavy"]) == (family, samples, heavy)]
            temperatures, (colour, marker) = [x["temperature"] for x in cells], look(index)
            for name, style in (("bound", "-"), ("error", ":")):
                medians = [x[name]["median"] for x in cells]
                label = f"{name}, m = {samples}" + (f", {heavy} heavy pages" if heavy else "")
                panel.plot(temperatures, medians, style, color=colour, marker=marker, markersize=4, label=label)
        panel.set_title(wrapped(family))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.25, color="#888888")
        panel.set_xlabel("temperature")
    for panel in axes[::COLUMNS]:
        panel.set_ylabel("median / largest distance\nof two values")
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return drawing


def table(results: list[dict[str, Any]]) -> Table:
    """The worst cell of each family for a terminal."""
    shown = Table("inputs", "draws", "most failures", "interval of 95%", title="failures of a row's certificate")
    for family in dict.fromkeys(x["family"] for x in results):
        worst = max((x for x in results if x["family"] == family), key=lambda x: x["failures"])
        low, high = worst["interval"]
        shown.add_row(family, str(worst["draws"]), str(worst["failures"]), f"{low:.4f} to {high:.4f}")
    return shown
