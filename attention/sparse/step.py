"""A step of decoding: one query a head reads the pages that its tile has chosen, as they lie by the kernel in C.

Elsewhere one head after another copies them; what counts then is that each page is copied as a whole, and to where the
caches keep it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention.masks import Mask
from attention.native import reading
from attention.sparse import kernel
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
    (B, K, G, H), offset, P = query.shape, state.length - 1, state.key.shape[2]
    position = offset // rule.query_block * rule.query_block

    def chosen(query, box):
        """Of query heads that choose together."""
        lead = Tile(offset[None], position, query[:, None], jnp.ones(1, bool))
        return choice(rule, lead, box, mask, cap)

    def choose():
        each = G if rule.shared else 1
        found = _by_head(chosen, (0, None))(query.reshape(B, K, G // each, each, H), state.box)
        return jnp.repeat(found, each, axis=2)

    now = lax.cond(position < offset, lambda: begun, choose)

    slots = jax.vmap(lambda chosen: _slots(rule, position, chosen, P, mask))(now.reshape(B * K * G, -1))
    slots = slots.reshape(B, K, G, -1)
    return over_pages(query, state.key, state.value, slots, mask, state.length, cap), now


def _slots(rule: Selection, position, chosen: Int[Array, " n"], P: int, mask: Mask) -> Int[Array, " m"]:
    """The pages that a query reads; -1 for none."""
    at, exists = read(rule, position, chosen, P, mask)
    return jnp.where(exists, at, -1)


def over_pages(
    query: Float[Array, "B K G H"], key, value, slots: Int[Array, "B K G m"], mask: Mask, length, cap
) -> Float[Array, "B K G E"]:
    """Softmax of one query a head over the keys that it sees in a list of pages, `B K P C ...`, -1 for none."""
    operands = {"query": query, "key": key, "value": value} | ({} if cap is None else {"cap": cap})
    arrays, form = jax.tree.flatten((slots, mask, length))
    return _over_pages(operands, arrays, form)


# As in `attention.sparse.certified`, the mask travels as bare arrays.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _over_pages(operands, arrays, form):
    slots, mask, length = jax.tree.unflatten(form, arrays)
    if kernel.able_step(operands["query"], operands["key"]):
        return reading.read_pages(*(operands[x] for x in ("query", "key", "value")), slots, mask, operands.get("cap"))[
            0
        ]
    return _head_by_head(operands, slots, mask, length)


@_over_pages.defjvp
def _over_pages_jvp(form, primals, tangents):
    operands, arrays = primals
    slots, mask, length = jax.tree.unflatten(form, arrays)
    return jax.jvp(lambda x: _head_by_head(x, slots, mask, length), (operands,), (tangents[0],))


def _head_by_head(operands, slots: Int[Array, "B K G m"], mask: Mask, length) -> Float[Array, "B K G E"]:
    """Each page is copied once, as a whole."""
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    (B, K, G, H), C = query.shape, key.shape[3]

    def head(n):
        at = slots.reshape(B * K * G, -1)[n]
        keys, values = (gathered(x, n // G, at.clip(0), length) for x in (key, value))
        there = jnp.repeat(at >= 0, C)[None, None]
        visible = mask.at(jnp.zeros(1, jnp.int32), keys_of(at.clip(0), C))[0, 0] & there
        return attend(query.reshape(-1, 1, 1, H)[n], keys, values, visible, operands.get("cap"), None).output[0, 0]

    return lax.map(head, jnp.arange(B * K * G)).reshape(B, K, G, -1)


def _by_head(function, axes):
    """`function` of those who choose together, for all of them."""
    return jax.vmap(jax.vmap(jax.vmap(function, axes)))


def gathered(x: Float[Array, "B K P C X"], n, at: Int[Array, " m"], length) -> Float[Array, "mC X"]:
    """The pages `at` of key head n, each copied as one row; zeros beyond the length, where there may be anything."""
    B, K, P, C, X = x.shape
    found = jnp.take(x.reshape(B * K * P, C * X), n * P + at, axis=0, mode="clip")
    there = jnp.arange(C * X)[None] < (length - C * at[:, None]) * X
    return jnp.where(there, found, jnp.zeros_like(found)).reshape(-1, X)
