r"""What linear attention keeps of the keys, and how it is stabilised.

A linear method replaces e^{q.k} by phi(q).phi(k), so that a row of attention is

    o_t = phi(q_t) . (sum_j phi(k_j) v_j^T)  /  phi(q_t) . (sum_j phi(k_j))

and the two sums are all that has to be kept of the keys.

Feature maps are often exponentials, so a token brings phi = e^{log_scale} features with features of order one.
The log_scale of a query cancels between numerator and denominator. Those of the keys are taken relative to
their running maximum r_t, carried with the state: row t meets only e^{log_scale_j - r_t} <= 1 with j <= t.
Inside a causal chunk the products features_t . features_j are formed first, and that factor, zero for j > t,
multiplies the C x C tile. No number of an earlier row depends on a later key, so causality holds bit for bit.
r_t cancels exactly and has no gradient.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

HIGHEST = lax.Precision.HIGHEST


class Features(NamedTuple):
    """phi(x) = e^{log_scale} features: features of shape `B K g C M`, one log_scale a token, `B K g C`."""

    features: Float[Array, "..."]
    log_scale: Float[Array, "..."]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearState:
    """What is kept of the keys: e^top value and e^top weight are the sums of phi(k) v^T and of phi(k).

    States over disjoint keys merge by rescaling both to the larger `top` and adding.
    """

    value: Float[Array, "B K g M E"]
    weight: Float[Array, "B K g M"]
    top: Float[Array, "B K g"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, B: int, K: int, g: int, M: int, E: int, dtype: Any) -> "LinearState":
        """The state that has seen no key."""
        return cls(
            value=jnp.zeros((B, K, g, M, E), dtype),
            weight=jnp.zeros((B, K, g, M), dtype),
            top=jnp.full((B, K, g), -jnp.inf, dtype),
            length=jnp.zeros((), jnp.int32),
        )

    def with_groups(self, g: int) -> "LinearState":
        """The state with `g` sets of key features where it had one."""
        if self.top.shape[2] >= g:
            return self
        wide = {name: jnp.repeat(getattr(self, name), g, axis=2) for name in ("value", "weight", "top")}
        return dataclasses.replace(self, **wide)


def absorb(state: LinearState, key: Features, value: Float[Array, "B K C E"]) -> LinearState:
    """The state with the keys of a chunk added; those whose log_scale is -inf do not exist."""
    top = jnp.maximum(state.top, lax.stop_gradient(key.log_scale).max(-1))
    kept = relative(state.top, top)
    scaled = key.features * relative(key.log_scale, top[..., None])[..., None]
    sums = jnp.einsum("BKgCM,BKCE->BKgME", scaled, value, precision=HIGHEST)
    return dataclasses.replace(
        state,
        value=state.value * kept[..., None, None] + sums,
        weight=state.weight * kept[..., None] + scaled.sum(-2),
        top=top,
    )


def read(state: LinearState, query: Float[Array, "B K G C M"]) -> tuple[Array, Array]:
    """Numerators `B K G C E` and denominators `B K G C` of rows that see all of the state, times e^-top."""
    numerator = jnp.einsum("BKGCM,BKGME->BKGCE", query, state.value, precision=HIGHEST)
    return numerator, jnp.einsum("BKGCM,BKGM->BKGC", query, state.weight, precision=HIGHEST)


def read_causally(
    state: LinearState, query: Float[Array, "B K G C M"], key: Features, value: Float[Array, "B K C E"]
) -> tuple[Array, Array]:
    """As `read`, for rows that see the state and the keys of their own chunk up to their own index."""
    own = lax.stop_gradient(key.log_scale)
    top = jnp.maximum(state.top[..., None], lax.cummax(own, axis=own.ndim - 1))
    numerator, denominator = read(state, query)
    before = relative(state.top[..., None], top)
    past = jnp.tri(own.shape[-1], dtype=bool)[None, None, None]
    factor = relative(jnp.where(past, key.log_scale[..., None, :], -jnp.inf), top[..., None])
    tile = factor * jnp.einsum("BKGCM,BKGDM->BKGCD", query, key.features, precision=HIGHEST)
    numerator = before[..., None] * numerator + jnp.einsum("BKGCD,BKDE->BKGCE", tile, value, precision=HIGHEST)
    return numerator, before * denominator + tile.sum(-1)


def relative(logarithm: Array, top: Array) -> Array:
    """e^(logarithm - top), 0 where the logarithm is -inf, even where `top` is too."""
    return jnp.exp(jnp.where(jnp.isneginf(logarithm), -jnp.inf, logarithm - jnp.where(jnp.isneginf(top), 0, top)))
