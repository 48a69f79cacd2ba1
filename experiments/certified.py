"""What `Certified` reads, how loose its bounds are, and how fast it is: over inputs, temperatures and tolerances."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

import attention
from attention.sparse.bounds import REACH
from experiments.certified_figure import figure, table
from experiments.operand_families import FAMILIES, NORMS, RACED
from experiments.operand_files import load
from experiments.oracle_pages import Found, looked_at, oracle
from experiments.timing import interleaved, ratios, spread

__all__ = ["Certified", "figure", "table"]

RACES = (
    ("coherent runs", False, 1.0),
    ("coherent runs", True, 1.0),
    ("shuffled runs", False, 1.0),
    ("iid", False, 8.0),
    *((f"iid, norms of {norm}", False, 8.0) for norm in NORMS),
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
        """One head, bidirectional: the share of keys read, and the bound over the error where something was not."""
        method = attention.Certified(tolerance=tolerance, page=self.page, bound=bound)
        found = Found(*map(np.asarray, looked_at(operands, np.float32(temperature), method)))
        loose = (found.bound / np.maximum(found.error, np.finfo(np.float32).tiny))[found.fires & (found.error > 0)]
        return {
            "family": family,
            "bound": bound,
            "tolerance": tolerance,
            "temperature": temperature,
            "fires": float(found.fires.mean()),
            "read": float(found.read),
            "oracle": float(oracle(operands, temperature, (tolerance,), self.page).mean()),
            "bound_over_error": spread(loose) if loose.size else None,
            "violations": int(np.sum(found.error > found.bound)),
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
