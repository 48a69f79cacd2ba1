"""Online softmax over blocks of keys, with a tile's keys in front of its rows."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.exponential import finite, power, unit
from attention.rounding import CALM, product


class Partial(NamedTuple):
    """What some of the keys contribute to N rows.

    Attributes:
        level: a number that no logit exceeds, in units of `exponential.unit`; -inf where no key was seen.
        sums: sum(exp(logit - level) v), and in the last row sum(exp(logit - level)).
    """

    level: Float[Array, " N"]
    sums: Float[Array, "F N"]


def begun(size: Float[Array, " N"], entries: int) -> Partial:
    """Of rows whose logits are no larger than `size`: that is the level of calm rows from the start."""
    level = jnp.where(size <= CALM, size * unit(size.dtype), -jnp.inf)
    return Partial(level, jnp.zeros((entries, len(size)), size.dtype))


def resumed(level: Float[Array, " N"], total: Float[Array, " N"], output: Float[Array, "N E"]) -> Partial:
    """What was `finished`, to go on with: from its level, the sum of its weights and its output."""
    return Partial(level, jnp.concatenate([output.T * total[None], total[None]]))


def weighing(residual: Float[Array, " N"]) -> Partial:
    """Rows of whose keys nothing is kept but the log of the sum of their exponentials."""
    return Partial(residual * unit(residual.dtype), jnp.ones((1, len(residual)), residual.dtype))


def added(
    found: Partial,
    size: Float[Array, " N"],
    raw: Float[Array, "C N"],
    values: Float[Array, "F C"],
    shown: Bool[Array, "C N"] | None,
) -> Partial:
    """With the keys of one more block: logits in units, values across with a row of ones, and what is seen of them."""
    calm = size <= CALM
    masked = raw if shown is None else jnp.where(shown, raw, -jnp.inf)
    # A row keeps its own kind of level, whatever the others in its tile do: the tile only decides what is computed.
    largest = lax.cond(calm.all(), lambda: found.level, lambda: jnp.maximum(found.level, masked.max(0)))
    level = jnp.where(calm, found.level, largest)
    top = finite(level)
    gained = product("FS,SN->FN", values, power(masked - top[None]))
    return Partial(level, found.sums * power(found.level - top)[None] + gained)


def finished(found: Partial) -> tuple[Float[Array, "N E"], Float[Array, " N"]]:
    """The weighted mean of the values, 0 where no key was seen, and the log of the sum of exponentials."""
    total = found.sums[-1]
    output = (found.sums[:-1] / jnp.where(total > 0, total, 1)[None]).T
    return output, jnp.log(total) + found.level / unit(total.dtype)


def across(value: Float[Array, "S E"], dtype) -> Float[Array, "F S"]:
    """The values across, above a row of ones: one product then gives the weighted sum and the sum of the weights."""
    value = value.astype(dtype).T
    return jnp.concatenate([value, jnp.ones_like(value[:1])])
