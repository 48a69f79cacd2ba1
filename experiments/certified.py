"""What `Certified` reads, how loose its bounds are, and how fast it is: over inputs, temperatures and tolerances."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attention
from attention.inputs import prepare
from attention.sparse.bounds import REACH
from attention.sparse.moments import moments
from attention.sparse.plan import growing_means, limits, plan, visible_pages
from experiments.drawing import COLOURS, wrapped
from experiments.operand_files import load
from experiments.timing import interleaved, ratios, spread

LOOKS = dict(zip(REACH, COLOURS, strict=False))
COLUMNS = 4  # of the figure
RUN = 256  # keys around a shared centre
RACES = (
    ("coherent runs", False, 1.0),
    ("coherent runs", True, 1.0),
    ("shuffled runs", False, 1.0),
    ("iid", False, 8.0),
    ("iid", False, 1.0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certified:
    """The share of keys that Certified reads against an oracle's, its looseness, and its time against Chunked."""

    lengths: tuple[int, ...] = (16384,)
    """Tokens of the races, T = S."""
    tokens: int = 2048
    """Tokens of what is not timed."""
    heads: int = 8
    """Heads of the races, N."""
    head_size: int = 64
    """Size of a head, H."""
    page: int = 64
    """Keys of a page where nothing is timed."""
    temperatures: tuple[float, ...] = tuple(2.0**i for i in range(-3, 4))
    """Of what is not timed."""
    tolerances: tuple[float, ...] = (0.1, 0.01, 0.001)
    """Of what is not timed; the figure shows the middle one."""
    bounds: tuple[str, ...] = tuple(REACH)
    """Of a page's logits."""
    rounds: int = 5
    """Turns of each contestant."""
    seconds: float = 60.0
    """Of a race, after which no more turns begin; there are at least 3."""
    operands: tuple[Path, ...] = ()
    """Files of `python -m experiments.capture`, whose layers are looked at besides, bidirectionally, by their first
    sequence's first head; `tokens` at most of each."""
    out: Path = Path("runs/benchmark/certified")
    """Folder for results.json, certified.svg and certified.png."""

    def measured(self) -> list[dict[str, Any]]:
        console = Console(stderr=True)
        inputs = self._inputs()
        axes = list(itertools.product(self.bounds, self.tolerances, inputs, self.temperatures))
        steps = track(axes, "certifying", console=console, disable=not console.is_terminal)
        results = [self._looked_at(inputs[axis[2]], *axis) for axis in steps]
        return results + [self._raced(T, *race) for T in self.lengths for race in RACES]

    def _inputs(self) -> dict[str, tuple[np.ndarray, ...]]:
        """Queries, keys and values of one head, by what they are."""
        sizes = (self.tokens, 1, self.head_size, False)
        found = {family: draw(np.random.default_rng(0), *sizes) for family, draw in FAMILIES.items()}
        for path in self.operands:
            for depth, layer in enumerate(load(path)):
                parts = (layer.query, layer.key, layer.value)
                found[f"{layer.name}, layer {depth}"] = tuple(x[:1, : self.tokens, :1] for x in parts)
        return found

    def _looked_at(self, operands, bound: str, tolerance: float, family: str, temperature: float) -> dict[str, Any]:
        """One head, bidirectional: the shares of pages read, and the bound over the error where a page was not."""
        method = attention.Certified(tolerance=tolerance, page=self.page, bound=bound)
        error, limit, read, oracle = (np.asarray(x) for x in looked_at(operands, np.float32(temperature), method))
        fires = read < 1
        loose = (limit / np.maximum(error, np.finfo(np.float32).tiny))[fires & (error > 0)]
        return {
            "family": family,
            "bound": bound,
            "tolerance": tolerance,
            "temperature": temperature,
            "fires": float(fires.mean()),
            "read": float(read.mean()),
            "oracle": float(oracle.mean()),
            "bound_over_error": spread(loose) if loose.size else None,
            "violations": int(np.sum(error > limit)),
        }

    def _raced(self, T: int, family: str, causal: bool, temperature: float) -> dict[str, Any]:
        operands = RACED[family](np.random.default_rng(0), T, self.heads, self.head_size, causal)
        operands = [jnp.asarray(x) for x in operands]
        options = {"is_causal": causal}
        methods = {"Certified": attention.Certified(), "Chunked": attention.Chunked()}
        calls = {}
        for name, method in methods.items():
            function = jax.jit(functools.partial(attention.dot_product_attention, method=method, **options))
            calls[name] = functools.partial(_call, function, operands, np.float32(temperature))
        seconds = interleaved(calls, self.rounds, self.seconds)
        certify = jax.jit(functools.partial(attention.certified_attention, method=methods["Certified"], **options))
        output, certificate = certify(*operands, temperature=np.float32(temperature))
        error = np.linalg.norm(np.asarray(output - calls["Chunked"]()), axis=-1)
        return {
            "label": f"{family}{', causal' if causal else ''}, temperature {temperature:g}",
            "length": T,
            "seconds": {name: spread(times) for name, times in seconds.items()},
            "slower_than_certified": ratios(seconds, "Certified")["Chunked"],
            "work": float(certificate.work),
            "largest_error": float(error.max()),
            "largest_bound": float(certificate.error_bound.max()),
        }


def _call(function, operands, temperature):
    return jax.block_until_ready(function(*operands, temperature=temperature))


def iid(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """Standard normal, as everything else before it is given a structure: `1 T N H`, float32."""
    del causal
    return tuple(rng.standard_normal((1, T, N, H), np.float32) for _ in range(3))


def clustered(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """Keys of a run of 64 around a centre of their own, of the same size as their spread; queries anywhere."""
    query, key, value = iid(rng, T, N, H, causal)
    centres = np.repeat(rng.standard_normal((1, -(-T // 64), N, H), np.float32), 64, axis=1)[:, :T]
    return query, (centres + key) / np.float32(np.sqrt(2)), value


def power_law(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """Entry h of queries and keys in proportion to 1 / h, at the norm of a standard normal one."""
    query, key, value = iid(rng, T, N, H, causal)
    decay = np.arange(1, H + 1, dtype=np.float32) ** -1
    decay *= np.sqrt(H / np.sum(decay**2))
    return query * decay, key * decay, value


def coherent(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """Runs of keys 0.2 around centres of size 1.5, and runs of queries around another's centre; causal, their own."""
    query, key, value = iid(rng, T, N, H, causal)
    runs = -(-T // RUN)
    centres = 1.5 * rng.standard_normal((1, runs, N, H), np.float32)
    others = np.arange(runs) if causal else rng.permutation(runs)
    around = (np.repeat(x, RUN, axis=1)[:, :T] for x in (centres[:, others], centres))
    query, key = (centre + np.float32(0.2) * x for centre, x in zip(around, (query, key), strict=True))
    return query.astype(np.float32), key.astype(np.float32), value


def shuffled(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """The same, with the queries in any order, and the keys with their values in another."""
    query, key, value = coherent(rng, T, N, H, causal)
    queries, keys = rng.permutation(T), rng.permutation(T)
    return query[:, queries], key[:, keys], value[:, keys]


FAMILIES = {"iid": iid, "clustered pages": clustered, "power law": power_law, "coherent runs": coherent}
RACED = FAMILIES | {"shuffled runs": shuffled}  # whose pages are not those of the order in which they come


@functools.partial(jax.jit, static_argnames="method")
def looked_at(operands, temperature, method: attention.Certified):
    """Of each query: the error, its bound, the share of pages read, and the share that an oracle would read.

    The oracle knows every key. It replaces pages by their means from the one that changes the output least on, as long
    as the error, computed and not bounded, is within the tolerance.
    """
    inputs = prepare(method, *operands, temperature=temperature)
    query, key, value = inputs.query[0, 0], inputs.key[0, 0], inputs.value[0, 0]
    pages = moments(key, value, method.page, bound=method.bound)
    visible = visible_pages(inputs.mask, growing_means(key, method.page), 0, query.shape[1], method.page, regular=True)
    own = jax.tree.map(lambda x: x[0, 0], limits(inputs, method.page, rescalings=0, fixed_shift=0.0))
    options = {"size": method.page, "tolerance": method.tolerance, "reach": REACH[method.bound]}
    chosen = plan(query, pages, visible, own, **options)
    output, certificate = attention.certified_attention(*operands, temperature=temperature, method=method)
    exact = attention.dot_product_attention(*operands, temperature=temperature)[0, :, 0]
    error = jnp.linalg.norm(output[0, :, 0] - exact, axis=-1)
    allowed = method.tolerance * pages.width.max()
    oracle = _oracle(query[0], key, value, exact, pages, method.page, allowed)
    return error, certificate.error_bound[0, :, 0], chosen.read.mean(0)[0], oracle


def _oracle(query, key, value, exact, pages, size: int, allowed):
    """The share of pages that it reads: with e_p what page p's mean changes, the error is |sum e_p| / Z^."""

    def row(query, exact):
        logits = (key @ query).reshape(-1, size)
        top = logits.max()
        weights, means = jnp.exp(logits - top), size * jnp.exp(pages.key @ query - top)
        centred = (value - exact[None]).reshape(*logits.shape, -1)
        change = means[:, None] * (pages.value - exact[None]) - jnp.einsum("ps,pse->pe", weights, centred)
        order = jnp.argsort(jnp.linalg.norm(change, axis=-1))
        grown = means - weights.sum(-1)
        total = weights.sum() + jnp.cumsum(grown[order])
        error = jnp.linalg.norm(jnp.cumsum(change[order], axis=0), axis=-1) / total
        fits = jnp.where(error <= allowed, jnp.arange(1, len(error) + 1), 0).max()
        return 1 - fits / len(error)

    return jax.lax.map(lambda x: row(*x), (query, exact))


def figure(results: list[dict[str, Any]]) -> Figure:
    """The share of keys read at the middle tolerance over temperature; below it the bound over the error, where some \
page was not read (medians)."""
    tolerances = sorted({x["tolerance"] for x in results if "family" in x})
    middle = tolerances[len(tolerances) // 2]
    families = list(dict.fromkeys(x["family"] for x in results if "family" in x))
    loose = [x["bound_over_error"]["median"] for x in results if x.get("bound_over_error")]
    bands = -(-len(families) // COLUMNS)
    drawing = Figure(figsize=(3.3 * COLUMNS, 5.6 * bands), layout="constrained")
    grid = drawing.subplots(2 * bands, COLUMNS, sharex=True, sharey="row", squeeze=False)
    for panel in grid.flat:
        panel.set_visible(False)
    for place, family in enumerate(families):
        row, column = 2 * (place // COLUMNS), place % COLUMNS
        upper, lower = grid[row, column], grid[row + 1, column]
        for panel in (upper, lower):
            panel.set_visible(True)
            panel.tick_params(labelbottom=True)
        _family(upper, lower, [x for x in results if x.get("family") == family and x["tolerance"] == middle])
        upper.set(title=wrapped(family), ylim=(-0.05, 1.05))
        lower.set_ylim(1, 2 * max(loose, default=1e3))
        if not column:
            upper.set_ylabel(f"keys read at {middle:g}")
            lower.set_ylabel("bound / error")
    grid[0, 0].legend(frameon=False, fontsize=8)
    return drawing


def _family(upper: Axes, lower: Axes, cells: list[dict[str, Any]]) -> None:
    """The two panels of one kind of inputs."""
    for bound in dict.fromkeys(x["bound"] for x in cells):
        those = [x for x in cells if x["bound"] == bound]
        temperatures = [x["temperature"] for x in those]
        upper.plot(temperatures, [x["read"] for x in those], color=LOOKS[bound], marker="o", label=bound)
        fired = [x for x in those if x["bound_over_error"]]
        loose = [x["bound_over_error"]["median"] for x in fired]
        lower.plot([x["temperature"] for x in fired], loose, color=LOOKS[bound], marker="o")
        oracle = [x["oracle"] for x in those]
    upper.plot(temperatures, oracle, color="#555555", linestyle="--", label="oracle")
    lower.set_xlabel("temperature")
    lower.set_xscale("log", base=2)
    lower.set_yscale("log")


def table(results: list[dict[str, Any]]) -> Table:
    """The races for a terminal."""
    shown = Table("inputs", "T", "Certified, ms", "Chunked, ms", "ratio", "work", title="medians")
    for race in (x for x in results if "label" in x):
        times = (f"{1e3 * race['seconds'][name]['median']:.0f}" for name in ("Certified", "Chunked"))
        ratio = f"{race['slower_than_certified']['median']:.2f}"
        shown.add_row(race["label"], str(race["length"]), *times, ratio, f"{race['work']:.3f}")
    return shown
