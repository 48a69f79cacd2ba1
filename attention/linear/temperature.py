"""How feature maps share the temperature out between queries and keys."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.inputs import Inputs
from attention.linear.engine import FeatureMap
from attention.linear.state import Features


def shared(
    inputs: Inputs,
    query: Callable[[Array, Array], Features],
    key: Callable[[Array, Array], Features],
    size: int,
    *,
    own_keys: bool = False,
) -> FeatureMap:
    """The feature map of x = beta q / sqrt|beta| and y = k sqrt|beta|, so that x.y is the logit.

    Each carries half of the temperature, whatever the data are. The sign of a negative beta stays with the query. At
    beta = 0 both are 0: a method whose features of 0 do not depend on the token then gives the mean.

    Args:
        inputs: the operands.
        query: features of x, `B K G C H`, given the positions `b C` too.
        key: features of y, `B K g C H`.
        size: M.
        own_keys: whether the features of a key differ between the query heads of a group even at one temperature.
    """
    G = inputs.query.shape[2]
    own = G > 1 and (own_keys or inputs.beta.ndim > 0)
    down, up = halves(inputs.beta)

    def keys(k: Array, position: Array) -> Features:
        y = k[:, :, None] * up
        return key(jnp.broadcast_to(y, (*y.shape[:2], G, *y.shape[3:])) if own else y, position)

    return FeatureMap(query=lambda q, i: query(q * down, i), key=keys, size=size, groups=G if own else 1)


def halves(beta: Float[Array, "..."]) -> tuple[Array, Array]:
    """The factors 1 / sqrt|beta| of queries, which carry beta, and sqrt|beta| of keys; both 0 at 0.

    Five axes, `1 K G 1 1` or all of size 1. The square root is guarded, so that its gradient at 0 is not NaN.
    """
    zero = beta == 0
    root = jnp.sqrt(jnp.where(zero, 1, jnp.abs(beta)))
    return five_axes(jnp.where(zero, 0, 1 / root)), five_axes(jnp.where(zero, 0, root))


def five_axes(beta: Float[Array, "..."]) -> Float[Array, "1 K G 1 1"]:
    """One number a head, or one for all, as it multiplies queries `B K G T H`."""
    K, G = beta.shape if beta.ndim else (1, 1)
    return beta.reshape(1, K, G, 1, 1)
