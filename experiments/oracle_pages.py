"""What `Certified` did for one head, row by row, and what an oracle of page means would read that knows every key."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import attention

ROWS = 256  # that the oracle looks at together


class Found(NamedTuple):
    """Of each query, `T`, the error, its bound, and whether anything was left out; of the head the share of keys read.

    What its certificate says, whichever way the head went: by pages, by the moments of all keys, or by every key.
    """

    error: Any
    bound: Any
    fires: Any
    read: Any


@functools.partial(jax.jit, static_argnames=("method", "causal"))
def looked_at(operands, temperature, method: attention.Certified, *, causal: bool = False) -> Found:
    """What was executed for one head, `1 T 1 H`."""
    options: dict[str, Any] = {"temperature": temperature, "is_causal": causal}
    output, certificate = attention.certified_attention(*operands, method=method, **options)
    error = jnp.linalg.norm(output - attention.dot_product_attention(*operands, **options), axis=-1)
    return Found(
        error[0, :, 0], certificate.error_bound[0, :, 0], certificate.dropped_mass[0, :, 0] > 0, certificate.work
    )


def oracle(operands, temperature, tolerances, page: int, *, causal: bool = False) -> np.ndarray:
    """The share of the keys that each query sees which an oracle would read, `tolerance T`.

    It knows every key. Of the pages that a query sees whole it replaces by their means as many as it can, from the one
    that changes the output least on, as long as the error, computed and not bounded, is within the tolerance.
    """
    allowed = np.multiply.outer(np.asarray(tolerances, np.float32), diameters(operands[2][0, :, 0], causal))
    return np.asarray(_oracle(operands, np.float32(temperature), allowed, page=page, causal=causal))


def diameters(value, causal: bool) -> np.ndarray:
    """The largest distance of two values that each query sees, in float64, by their inner products."""
    value = np.asarray(value, np.float64)
    squares = np.square(value).sum(-1)
    apart = squares[:, None] + squares[None] - 2 * value @ value.T
    largest = np.maximum.accumulate(np.tril(apart).max(1)) if causal else np.full(len(value), apart.max())
    return np.sqrt(np.maximum(largest, 0)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("page", "causal"))
def _oracle(operands, temperature, allowed, *, page: int, causal: bool):
    exact = attention.dot_product_attention(*operands, temperature=temperature, is_causal=causal)[0, :, 0]
    query, key, value = (x[0, :, 0] for x in operands)
    query = query / (temperature * query.shape[1] ** 0.5)
    S = len(key)
    key, value = (jnp.pad(x, ((0, -S % page), (0, 0))).reshape(-1, page, x.shape[1]) for x in (key, value))
    means, places = (key.mean(1), value.mean(1)), jnp.arange(key.shape[0] * page).reshape(-1, page)

    def row(query, exact, allowed, at):
        seen = places <= (at if causal else S - 1)
        logits = jnp.where(seen, key @ query, -jnp.inf)
        top = logits.max()
        weights, alike = jnp.exp(logits - top), page * jnp.exp(means[0] @ query - top)
        # With e_p what page p's mean changes, the error is |sum e_p| / Z^ over those that are replaced.
        change = alike[:, None] * (means[1] - exact) - (
            jnp.einsum("ps,pse->pe", weights, value) - weights.sum(1)[:, None] * exact
        )
        whole = seen.all(1)
        order = jnp.argsort(jnp.where(whole, jnp.linalg.norm(change, axis=-1), jnp.inf))
        total = weights.sum() + jnp.cumsum((alike - weights.sum(1))[order])
        error = jnp.linalg.norm(jnp.cumsum(change[order], axis=0), axis=-1) / total
        number = jnp.arange(1, len(order) + 1)
        fits = (error <= allowed[:, None]) & (number <= whole.sum())
        return 1 - page * jnp.where(fits, number, 0).max(1) / seen.sum()

    with jax.numpy_rank_promotion("allow"):
        rows = (query, exact, allowed.T, jnp.arange(len(query)))
        return jax.lax.map(lambda x: row(*x), rows, batch_size=ROWS).T
