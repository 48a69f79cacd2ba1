r"""What linear attention keeps of the keys, and how it is stabilised.

A linear method replaces e^{q.k} by phi(q).phi(k), so that a row of attention is

    o_t = phi(q_t) . (sum_j phi(k_j) v_j^T)  /  phi(q_t) . (sum_j phi(k_j))

and the two sums are all that has to be kept of the keys.

Feature maps are often exponentials, so a token brings phi = e^{log_scale} features with features of order one.
The log_scale of a query cancels between numerator and denominator. Those of the keys are taken relative to
their running maximum, carried with the state in powers of two: with l = log_scale / ln 2, r_t is a running
maximum of numbers from l_j - 1/4 to below l_j + 3/4, and row t meets only 2^{l_j - r_t} <= 2^{1/4} with j <= t.
Since r rises by whole numbers, what it rescales loses no bit, and 2^{l_j - r_t} = 2^{l_j - r_j} 2^{r_j - r_t} costs
one exponential a token; the power of two in each entry of a causal C x C tile is an addition to an exponent's bits.
No number of an earlier row depends on a later key, so causality holds bit for bit. r cancels exactly and has no
gradient.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

HIGHEST = lax.Precision.HIGHEST


class Features(NamedTuple):
    """phi(x) = e^{log_scale} features: features of shape `B K g C M`, one log_scale a token, `B K g C`."""

    features: Float[Array, "..."]
    log_scale: Float[Array, "..."]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearState:
    """What is kept of the keys: 2^top sums is the sum of phi(k) [v, 1]^T.

    The last of E1 = E + 1 columns, of the sums of phi(k), gives denominators in the product that gives numerators.
    States over disjoint keys merge by rescaling both to the larger `top` and adding.
    """

    sums: Float[Array, "B K g M E1"]
    top: Float[Array, "B K g"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, B: int, K: int, g: int, M: int, E: int, dtype: Any) -> "LinearState":
        """The state that has seen no key."""
        return cls(
            sums=jnp.zeros((B, K, g, M, E + 1), dtype),
            top=jnp.full((B, K, g), -jnp.inf, dtype),
            length=jnp.zeros((), jnp.int32),
        )

    def with_groups(self, g: int) -> "LinearState":
        """The state with `g` sets of key features where it had one."""
        if self.top.shape[2] >= g:
            return self
        sums, top = (jnp.repeat(x, g, axis=2) for x in (self.sums, self.top))
        return dataclasses.replace(self, sums=sums, top=top)

    def aged(self, log_weight: Float[Array, "B K g"]) -> "LinearState":
        """The state whose keys all weigh e^{log_weight} times what they did: `top` falls, the sums hardly change.

        What adding to `top` rounds away goes into the sums, so that ages add up over any number of calls.
        """
        change = log_weight / math.log(2)
        top = self.top + lax.stop_gradient(change)
        moved = jnp.where(jnp.isneginf(top), 0, top) - jnp.where(jnp.isneginf(self.top), 0, self.top)
        sums = self.sums * jnp.exp((change - moved) * math.log(2))[..., None, None]
        return dataclasses.replace(self, sums=sums, top=top)


class Sight(NamedTuple):
    """Who sees whom in a chunk: earlier tokens, and the state, of a row's own segment.

    Attributes:
        tokens: `b 1 1 C C`, whether a row sees the key of a token.
        state: `b 1 1 C`, whether a row sees the state.
    """

    tokens: Bool[Array, "b 1 1 C C"]
    state: Bool[Array, "b 1 1 C"]


def with_ones(value: Float[Array, "B K C E"]) -> Float[Array, "B K C E1"]:
    """[v, 1], whose weighted sums are numerators and denominators side by side."""
    return jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)


def absorb(state: LinearState, key: Features, value: Float[Array, "B K C E1"], last: Sight | None = None):
    """The state with the keys of a chunk added; those whose log_scale is -inf do not exist.

    With `last`, what the last row does not see is left out, and the state replaced where that row does not see it.
    """
    base, start = _origin(state.top)
    exponent = key.log_scale / math.log(2) - base[..., None]
    if last is not None:
        exponent = jnp.where(last.tokens[..., -1, :], exponent, -jnp.inf)
        start = jnp.where(last.state[..., -1], start, -jnp.inf)
    level = jnp.maximum(start, _whole(exponent).max(-1))
    above = jnp.where(jnp.isneginf(level), 0, level)
    scaled = key.features * _exp2(exponent - above[..., None])[..., None]
    sums = jnp.einsum("BKgCM,BKCE->BKgME", scaled, value, precision=HIGHEST)
    kept = jnp.where(jnp.isneginf(start), 0, _power_of_two(-above))[..., None, None]
    return dataclasses.replace(state, sums=state.sums * kept + sums, top=base + level)


def read(state: LinearState, query: Float[Array, "B K G C M"]) -> Float[Array, "B K G C E1"]:
    """Numerators and denominators, times 2^-top, of rows that see all of the state."""
    return jnp.einsum("BKGCM,BKGME->BKGCE", query, state.sums, precision=HIGHEST)


def read_causally(
    state: LinearState, query: Float[Array, "B K G C M"], key: Features, value: Float[Array, "B K C E1"], sight: Sight
) -> Float[Array, "B K G C E1"]:
    """As `read`, for rows that see of the state and of the keys of their own chunk what `sight` says."""
    base, start = _origin(state.top)
    exponent = key.log_scale / math.log(2) - base[..., None]
    start = jnp.where(sight.state, start[..., None], -jnp.inf)
    raised = _whole(exponent)
    level = jnp.maximum(start, jnp.where(sight.tokens, raised[..., None, :], -jnp.inf).max(-1))
    level = jnp.where(jnp.isneginf(level), 0, level)
    rise = _power_of_two(level[..., None, :] - level[..., None])
    tile = jnp.einsum("BKGCM,BKGDM->BKGCD", query, key.features, precision=HIGHEST)
    tile = jnp.where(sight.tokens, tile * rise * _exp2(exponent - level)[..., None, :], 0)
    before = jnp.where(jnp.isneginf(start), 0, _power_of_two(-level))
    past = before[..., None] * read(state, query)
    return past + jnp.einsum("BKGCD,BKDE->BKGCE", tile, value, precision=HIGHEST)


def _origin(top: Float[Array, "B K g"]) -> tuple[Array, Array]:
    """What levels are counted from, and the level of the state: 0, or -inf where it has seen no key."""
    none = jnp.isneginf(top)
    return jnp.where(none, 0, top), jnp.where(none, -jnp.inf, jnp.zeros_like(top))


def _whole(exponent: Array) -> Array:
    """The whole number from 1/4 below an exponent to less than 3/4 above it.

    A compiler may compute an exponent anew in each loop that reads it, with another rounding, and all loops must find
    the same level. Zero keys have the whole or half exponents log2 M^-1/2 of M = 2^i features; a plain ceil has its
    step there.
    """
    return jnp.ceil(lax.stop_gradient(exponent) - 0.25)


def _exp2(exponent: Array) -> Array:
    """2^exponent; XLA computes the exponential to fewer units of roundoff."""
    return jnp.exp(exponent * math.log(2))


def _power_of_two(exponent: Array) -> Array:
    """2^exponent of whole numbers, exactly; those above 0 count as 0, and below the normal range the power is 0."""
    info = jnp.finfo(exponent.dtype)
    bias, integer = info.maxexp - 1, jnp.int64 if info.bits == 64 else jnp.int32
    bits = (lax.stop_gradient(exponent).clip(-bias, 0).astype(integer) + bias) << info.nmant
    return lax.bitcast_convert_type(bits, exponent.dtype)
