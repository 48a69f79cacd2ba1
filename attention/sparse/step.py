"""A step of decoding: one query a head, which reads the pages that its tile has chosen, one head after another.

What counts is that each page is copied once, as a whole, and to where the caches keep it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention.masks import Mask
from attention.sparse.gathered import attend
from attention.sparse.pages import PagedCache
from attention.sparse.selection import Selection, Tile, choice, keys_of, read


def step(
    rule: Selection,
    query: Float[Array, "B K G H"],
    state: PagedCache,
    mask: Mask,
    begun: Int[Array, "B K G n"],
    cap: Float[Array, ""] | None,
) -> tuple[Float[Array, "B K G E"], Int[Array, "B K G n"]]:
    """The output of the query of the last token in `state`, and the choice of its tile.

    `mask` is that of this query, causal and without tables; `begun` what its tile has chosen if it began before.
    """
    offset, (P, C) = state.length - 1, state.key.shape[2:4]
    position = offset // rule.query_block * rule.query_block

    B, K, G, H = query.shape

    def chosen(query, box):
        """Of query heads that choose together."""
        lead = Tile(offset[None], position, query[:, None], jnp.ones(1, bool))
        return choice(rule, lead, box, mask, cap)

    def choose():
        each = G if rule.shared else 1
        found = _by_head(chosen, (0, None))(query.reshape(B, K, G // each, each, H), state.box)
        return jnp.repeat(found, each, axis=2)

    now = lax.cond(position < offset, lambda: begun, choose)

    def head(n):
        at, exists = read(rule, position, now.reshape(B * K * G, -1)[n], P, mask)
        key, value = (gathered(x, n // G, at, state.length) for x in (state.key, state.value))
        there = jnp.repeat(exists, C)[None, None]
        visible = mask.at(jnp.zeros(1, jnp.int32), keys_of(at, C))[0, 0] & there
        return attend(query.reshape(-1, 1, 1, H)[n], key, value, visible, cap, None).output[0, 0]

    return lax.map(head, jnp.arange(B * K * G)).reshape(B, K, G, -1), now


def _by_head(function, axes):
    """`function` of those who choose together, for all of them."""
    return jax.vmap(jax.vmap(jax.vmap(function, axes)))


def gathered(x: Float[Array, "B K P C X"], n, at: Int[Array, " m"], length) -> Float[Array, "mC X"]:
    """The pages `at` of key head n, each copied as one row; zeros beyond the length, where there may be anything."""
    B, K, P, C, X = x.shape
    found = jnp.take(x.reshape(B * K * P, C * X), n * P + at, axis=0, mode="clip")
    there = jnp.arange(C * X)[None] < (length - C * at[:, None]) * X
    return jnp.where(there, found, jnp.zeros_like(found)).reshape(-1, X)
