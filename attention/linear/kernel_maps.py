"""From tokens of a call to random features: who carries which part of beta, the statistics, and the means."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.linear import activations, random_features
from attention.linear.state import HIGHEST, Features
from attention.linear.temperature import five_axes, halves

Kind = Literal["positive", "trigonometric", "hyperbolic", "relu", "optimal", "data_dependent"]
Map = Callable[[Array, Array], Features]
"""Of tokens, and of their positions."""

OF_A_TOKEN: dict[str, Callable[[Array, Array], Features]] = {
    "positive": random_features.positive_features,
    "trigonometric": random_features.trigonometric_features,
    "hyperbolic": random_features.hyperbolic_features,
    "relu": random_features.relu_features,
}


def check_constants(kind: Kind, constants: dict[str, Array], rows: int, K: int, H: int) -> None:
    """Raises ValueError unless the constants are those of K key heads of size H and `rows` rows of W."""
    shape, expected = constants["projection"].shape, (rows, H)
    returned = f"pass what this method's init(rng, num_heads=, head_dim={H}) returns"
    if shape != expected:
        raise ValueError(f"params: the projection has shape {shape}: expected {expected}; {returned}")
    needed = {"optimal": activations.standard_spread(), "data_dependent": activations.standard_geometry(H)}
    for name, standard in needed.get(kind, {}).items():
        found = constants[name].shape if name in constants else None
        if found is None or found[0] not in (1, K) or found[1:] != standard.shape[1:]:
            shapes = f"{standard.shape} or {(K, *standard.shape[1:])}"
            raise ValueError(f"params: {name} has shape {found}: expected {shapes}; {returned}, or fitted")


def kernel_maps(kind: Kind, constants: dict[str, Array], beta: Float[Array, "..."], K: int) -> tuple[Map, Map]:
    """The features of queries `B K G C H`, which carry beta, and of keys `B K C H`."""
    if kind in OF_A_TOKEN:
        return _plain(OF_A_TOKEN[kind], constants["projection"], beta)
    spread = constants["spread"]
    spread = spread.reshape(1, spread.shape[0], 1, 1, -1)
    ratio = random_features.best_ratio(jnp.abs(five_axes(beta)) * spread)

    def features(x, projection):
        return random_features.dense_exponential_features(x, projection, ratio)

    if kind == "optimal":
        return _plain(features, constants["projection"], beta)
    return _centred(features, constants, beta, K)


def _plain(features: Callable[[Array, Array], Features], projection, beta) -> tuple[Map, Map]:
    """phi(beta q / sqrt|beta|) and phi(k sqrt|beta|)."""
    down, up = halves(beta)
    return (
        lambda query, position: features(query * down, projection),
        lambda key, position: features(key[:, :, None] * up, projection),
    )


def _centred(features: Callable[[Array, Array], Features], constants, beta, K: int) -> tuple[Map, Map]:
    """The same around the means d and c, in coordinates of each key head's own.

    beta q.k = beta (q - d).(k - c) + beta q.c + beta d.(k - c), and the last two are scales of a token.
    """
    scale, (down, up) = five_axes(beta), halves(beta)
    d, c = (constants[name][None, :, None, None] for name in ("query_mean", "key_mean"))
    of_query, of_key = (_per_head(constants[name], K) for name in ("query_map", "key_map"))

    def of_queries(query, position):
        del position
        found = features(of_query((query - scale * d) * down), constants["projection"])
        return found._replace(log_scale=found.log_scale + (query * c).sum(-1))

    def of_keys(key, position):
        del position
        centred = key[:, :, None] - c
        found = features(of_key(centred * up), constants["projection"])
        return found._replace(log_scale=found.log_scale + (scale * d * centred).sum(-1))

    return of_queries, of_keys


def _per_head(matrices: Float[Array, "k H h"], K: int) -> Callable[[Array], Array]:
    """The product of tokens `B K g C h` with the matrix of their key head."""
    wide = jnp.broadcast_to(matrices, (K, *matrices.shape[1:]))
    return lambda tokens: jnp.einsum("BKgCh,KHh->BKgCH", tokens, wide, precision=HIGHEST)
