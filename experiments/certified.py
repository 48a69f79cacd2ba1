"""What `Certified` reads, how loose its bounds are, and how fast it is: over inputs, temperatures and tolerances."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

import attention
from attention.sparse.bounds import REACH
from experiments.certified_figures import figures, table
from experiments.operand_families import FAMILIES, NORMS, RACED
from experiments.operand_files import load
from experiments.oracle_pages import Found, looked_at, oracle
from experiments.timing import interleaved, ratios, spread

__all__ = ["Certified", "figures", "table"]

RACES = (
    ("coherent runs", False, 1.0),
    ("coherent runs", True, 1.0),
    ("shuffled runs", False, 1.0),
    ("iid", False, 8.0),
    *((f"iid, norms of {norm}", False, 8.0) for norm in NORMS),
    ("iid, norms of 12", False, 1.0),
    ("iid", False, 1.0),
)
Head = tuple[Any, Any, Any]
"""Queries, keys and values of one head, `1 T 1 H`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certified:
    """The share of keys that Certified reads against an oracle's, its looseness, and its time against exact methods."""

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
    """Of what is not timed; the figures show the middle one."""
    bounds: tuple[str, ...] = tuple(REACH)
    """Of a page's logits, where queries see all keys."""
    causal_bounds: tuple[str, ...] = ("ball",)
    """The same where attention is causal."""
    rounds: int = 5
    """Turns of each contestant."""
    seconds: float = 60.0
    """Of a race, after which no more turns begin; there are at least 3."""
    operands: tuple[Path, ...] = ()
    """Files of `python -m experiments.capture`, whose layers are looked at besides, by all heads of their first
    sequence; `tokens` at most of each."""
    out: Path = Path("runs/benchmark/certified")
    """Folder for results.json and the figures: certified, looseness and races, as SVG and PNG."""

    def measured(self) -> list[dict[str, Any]]:
        console = Console(stderr=True)
        looks = [(False, bound) for bound in self.bounds] + [(True, bound) for bound in self.causal_bounds]
        # A program for each of the first two and each size of a head.
        axes: list[Any] = list(itertools.product(looks, self.tolerances, self._inputs(False), self.temperatures))
        steps = track(axes, "certifying", console=console, disable=not console.is_terminal)
        results = [self._looked_at(*look, *axis) for look, *axis in steps]
        return results + [self._raced(T, *race) for T in self.lengths for race in RACES]

    @functools.cache  # noqa: B019 (a benchmark lives as long as its process)
    def _inputs(self, causal: bool) -> dict[str, list[Head]]:
        """The heads of each kind of inputs."""
        sizes = (self.tokens, 1, self.head_size, causal)
        found: dict[str, Any] = {family: [draw(np.random.default_rng(0), *sizes)] for family, draw in FAMILIES.items()}
        for path in self.operands:
            for depth, layer in enumerate(load(path)):
                found[f"{layer.name}, layer {depth}"] = list(heads(layer, self.tokens))
        return found

    @functools.cache  # noqa: B019 (it depends on no bound)
    def _oracle(self, causal: bool, family: str, temperature: float) -> dict[float, float]:
        """The share of keys that an oracle reads at each tolerance, mean over rows and heads."""
        every = self._inputs(causal)[family]
        shares = [oracle(head, temperature, self.tolerances, self.page, causal=causal) for head in every]
        return dict(zip(self.tolerances, np.mean(shares, (0, 2)).tolist(), strict=True))

    def _looked_at(self, causal: bool, bound: str, tolerance: float, family: str, temperature: float) -> dict[str, Any]:
        """All heads: the share of keys read, and the bound over the error where something was not."""
        method = attention.Certified(tolerance=tolerance, page=self.page, bound=bound)
        every = self._inputs(causal)[family]
        looks = [looked_at(head, np.float32(temperature), method, causal=causal) for head in every]
        found = Found(*(np.stack(x) for x in zip(*looks, strict=True)))
        loose = (found.bound / np.maximum(found.error, np.finfo(np.float32).tiny))[found.fires & (found.error > 0)]
        return {
            "family": family,
            "causal": causal,
            "bound": bound,
            "tolerance": tolerance,
            "temperature": temperature,
            "heads": len(every),
            "fires": float(found.fires.mean()),
            "read": float(found.read.mean()),
            "read_by_head": found.read.tolist(),
            "oracle": self._oracle(causal, family, temperature)[tolerance],
            "bound_over_error": spread(loose) if loose.size else None,
            "violations": int(np.sum(found.error > found.bound)),
        }

    def _raced(self, T: int, family: str, causal: bool, temperature: float) -> dict[str, Any]:
        operands = RACED[family](np.random.default_rng(0), T, self.heads, self.head_size, causal)
        operands = [jnp.asarray(x) for x in operands]
        options = {"is_causal": causal}
        methods = {"Certified": attention.Certified(), "Chunked": attention.Chunked(), "Fused": attention.Fused()}
        calls = {}
        for name, method in methods.items():
            function = jax.jit(functools.partial(attention.dot_product_attention, method=method, **options))
            calls[name] = functools.partial(_call, function, operands, np.float32(temperature))
        seconds = interleaved(calls, self.rounds, self.seconds)
        certify = jax.jit(functools.partial(attention.certified_attention, method=methods["Certified"], **options))
        output, certificate = certify(*operands, temperature=np.float32(temperature))
        error = np.linalg.norm(np.asarray(output - calls["Chunked"]()), axis=-1)
        slower = ratios(seconds, "Certified")
        return {
            "label": f"{family}{', causal' if causal else ''}, temperature {temperature:g}",
            "length": T,
            "seconds": {name: spread(times) for name, times in seconds.items()},
            "slower_than_certified": slower["Chunked"],
            "fused_slower_than_certified": slower["Fused"],
            "work": float(certificate.work),
            "largest_error": float(error.max()),
            "largest_bound": float(certificate.error_bound.max()),
        }


def heads(layer, tokens: int) -> Iterator[Head]:
    """The heads of the first sequence of a layer, each with the keys and values that it reads."""
    query, key, value = (np.asarray(x)[:1, :tokens] for x in (layer.query, layer.key, layer.value))
    shared = query.shape[2] // key.shape[2]
    for n in range(query.shape[2]):
        own = slice(n // shared, n // shared + 1)
        yield query[:, :, n : n + 1], key[:, :, own], value[:, :, own]


def _call(function, operands, temperature):
    return jax.block_until_ready(function(*operands, temperature=temperature))
