"""What `Certified` reads of one head, row by row, beside what an oracle would read that knows every key."""

import functools

import jax
import jax.numpy as jnp

import attention
from attention.inputs import prepare
from attention.rounding import CALM
from attention.sparse.by_pages import head_of, planned
from attention.sparse.heads import apart
from attention.sparse.plan import limits


@functools.partial(jax.jit, static_argnames="method")
def looked_at(operands, temperature, method: attention.Certified):
    """Of each query: the error, its bound, the share of pages read, and the share that an oracle would read.

    The oracle knows every key. It replaces pages by their means from the one that changes the output least on, as long
    as the error, computed and not bounded, is within the tolerance.
    """
    inputs = prepare(method, *operands, temperature=temperature)
    query, key, value = inputs.query[0, 0], inputs.key[0, 0], inputs.value[0, 0]
    head = head_of(inputs, method.options)
    own = jax.tree.map(lambda x: x[0, 0], limits(inputs, method.page, rescalings=0, fixed_shift=CALM))
    width = apart(value.astype(query.dtype), jnp.ones(len(value), bool))
    own = own._replace(width=jnp.full_like(own.width, width))
    chosen = planned(head, query, jnp.arange(query.shape[1]), own, method.options).plan
    output, certificate = attention.certified_attention(*operands, temperature=temperature, method=method)
    exact = attention.dot_product_attention(*operands, temperature=temperature)[0, :, 0]
    error = jnp.linalg.norm(output[0, :, 0] - exact, axis=-1)
    allowed = method.tolerance * width
    oracle = _oracle(query[0], key, value, exact, head.pages, method.page, allowed)
    read = jnp.where(certificate.dropped_mass[0, :, 0] > 0, chosen.read.mean(0)[0], 1)  # a head may read everything
    return error, certificate.error_bound[0, :, 0], read, oracle


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
