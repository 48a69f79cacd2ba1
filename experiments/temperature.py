"""The error of every method over the temperature, at equal work, on random operands and on those of a trained model."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

import attention
from attention.method import METHODS, Method
from experiments.budgets import within, work
from experiments.operand_files import concatenated, load
from experiments.operands import Operands, normal, trained
from experiments.temperature_figures import figure, table

TOLERANCES = (0.1, 0.01, 0.001)  # of certificates, in radii of the values


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
    by_layer: tyro.conf.FlagCreatePairsOff[bool] = False
    """Whether each layer of a file is a panel of its own."""
    seed: int = 0
    """Draws operands, parameters and constants."""
    out: Path = Path("runs/benchmark/temperature")
    """Folder for results.json, temperature.svg and temperature.png."""

    def measured(self) -> list[dict[str, Any]]:
        found = [normal(T, self.head_size, self.seed) for T in self.lengths]
        if self.steps:
            found.append(trained(self.context, self.steps, self.seed))
        for layers in map(load, self.operands):
            found += _numbered(layers) if self.by_layer else [concatenated(layers)]
        also = tuple(attention.parse_method(expression) for expression in self.also)
        return [errors(operands, self.temperatures, self.budget, also, self.seed) for operands in found]


def _numbered(layers: list[Operands]) -> list[Operands]:
    return [layer._replace(name=f"{layer.name}, layer {depth}") for depth, layer in enumerate(layers)]


def errors(
    operands: Operands, temperatures: tuple[float, ...], budget: float, also: tuple[Method, ...] = (), seed: int = 0
) -> dict[str, Any]:
    """The error of every registered method that is not exact, at each temperature, and what its certificate says.

    Beside them the entropy of softmax as a share of the logarithm of the keys' number, and the mass of the 16 largest
    weights, means over rows and heads.
    """
    case = [jnp.asarray(x) for x in (operands.query, operands.key, operands.value)]
    truth = [
        np.asarray(attend(attention.Chunked(), case, None, t, operands.causal)[0], np.float64) for t in temperatures
    ]
    centred = np.asarray(operands.value, np.float64) - np.mean(operands.value, axis=1, keepdims=True, dtype=np.float64)
    radius = float(np.linalg.norm(centred, axis=-1).max())
    console = Console(stderr=True)
    chosen = dict(pair for cls in METHODS.values() if (pair := within(cls, operands, budget)))
    chosen |= {method: work(method, operands) for method in also}
    rows: dict[str, Any] = {}
    for method, share in track(chosen.items(), operands.name, console=console, disable=not console.is_terminal):
        heads, size = operands.query.shape[-2:]
        params = method.init(jax.random.key(seed), num_heads=heads, head_dim=size)
        found = [jax.tree.map(np.asarray, attend(method, case, params, t, operands.causal)) for t in temperatures]
        error = [output.astype(np.float64) - exact for (output, _), exact in zip(found, truth, strict=True)]
        rows[repr(method)] = {"share_of_exact_operations": share} | compared(error, truth, radius)
        if method.capabilities.certificate != "none":
            rows[repr(method)] |= certified(error, [certificate for _, certificate in found], radius)
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


@functools.partial(jax.jit, static_argnames=("method", "causal"))
def attend(method: Method, case, params: Any, temperature, causal: bool) -> tuple[jax.Array, Any]:
    """The output, and the bound on its error with the share of the keys that were read, where there is one."""
    options: dict[str, Any] = {"params": params, "temperature": temperature, "is_causal": causal}
    if method.capabilities.certificate == "none":
        return attention.dot_product_attention(*case, method=method, **options), None
    output, certificate = attention.certified_attention(*case, method=method, **options)
    return output, (certificate.error_bound, certificate.work)


def compared(error: list[np.ndarray], truth: list[np.ndarray], radius: float) -> dict[str, Any]:
    """The size of errors `B T N E` at each temperature: relative to the output, and of the median row in radii."""
    pairs = zip(error, truth, strict=True)
    return {
        "relative_error": [float(np.linalg.norm(e) / np.linalg.norm(exact)) for e, exact in pairs],
        "error_over_radius": [float(np.median(np.linalg.norm(e, axis=-1))) / radius for e in error],
    }


def certified(error: list[np.ndarray], certificates: list[Any], radius: float) -> dict[str, Any]:
    """What certificates say at each temperature, and how loose they are where there is an error."""
    bounds = [bound.astype(np.float64) for bound, _ in certificates]
    sizes = [np.linalg.norm(e, axis=-1) for e in error]
    ratios = [bound[size > 0] / size[size > 0] for bound, size in zip(bounds, sizes, strict=True)]
    found = {
        "bound_over_radius": [float(np.median(bound)) / radius for bound in bounds],
        "largest_bound_over_radius": [float(bound.max()) / radius for bound in bounds],
        "bound_over_error": [float(np.median(ratio)) if ratio.size else None for ratio in ratios],
        "share_of_keys_read": [float(share) for _, share in certificates],
    }
    for tolerance in TOLERANCES:
        found[f"rows_certified_to_{tolerance:g}"] = [float((bound <= tolerance * radius).mean()) for bound in bounds]
    return found


__all__ = ["Temperature", "errors", "figure", "table"]
