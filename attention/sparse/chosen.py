"""Attention of tiles of queries over the pages that each has chosen, of heads that choose together.

Tiles count from position 0, wherever the queries begin, so that a sequence cut anywhere has the same ones. First all
tiles choose; then the kernel in C reads what they chose where there is one, and else tile after tile gathers it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.masks import Mask
from attention.sparse import kernel
from attention.sparse.gathered import Found, attend
from attention.sparse.odds import odds_of_the_rest
from attention.sparse.pages import Pages
from attention.sparse.rows import aligned
from attention.sparse.selection import Selection, choice, choosers, keys_of, read, unless_begun


class Cut(NamedTuple):
    """Queries, from position `offset` on, in `count` tiles of `size`, the first of which begins `shift` before them."""

    size: int
    count: int
    shift: Int[Array, ""] | int
    offset: Int[Array, ""]

    def rows(self, i) -> Int[Array, " R"]:
        return i * self.size - self.shift + jnp.arange(self.size)


class Choices(NamedTuple):
    """What each tile reads, and which of the slots hold a page; and what it chose of that."""

    at: Int[Array, "count m"]
    exists: Bool[Array, "count m"]
    chosen: Int[Array, "count n"]


def chosen_tiles(rule: Selection, part: Inputs, pages: Pages, begun, limit, *, certified: bool):
    """Outputs `G T E`, odds of what was not read `G T` (None unless certified), share of pages read, and last choice.

    Args:
        rule: what is selected.
        part: the operands of query heads that choose together, `1 1 G ...`.
        pages: of its keys.
        begun: what the tile has chosen in which the first query lies, where that tile began before it; or None.
        limit: `G T`, an upper bound on the size of logits; or None.
        certified: whether odds are computed.
    """
    mask, query = part.mask, part.query[0, 0]
    cut = _cut(rule, mask)
    found = _choices(rule, query, pages.box, mask, cut, begun, part.soft_cap)
    share = found.exists.sum(1) / len(pages.box)
    last = lax.dynamic_index_in_dim(found.chosen, (cut.shift + mask.num_queries - 1) // cut.size, keepdims=False)
    way = _by_kernel if kernel.able(part, rule.block_size) else _by_gathering
    output, against = way(rule, part, pages, cut, found, limit, certified=certified)
    return output, against, share, last


def _cut(rule: Selection, mask: Mask) -> Cut:
    T, R = mask.num_queries, rule.query_block
    offset = jnp.zeros((), jnp.int32) if mask.offset is None else mask.offset[0]
    moves = mask.causal and mask.offset is not None
    R = min(R, T) if not moves else (R if T >= R else 1)
    return Cut(R, -(-(T + (R - 1 if moves else 0)) // R), offset % R if moves else 0, offset)


def _choices(rule: Selection, query: Float[Array, "G T H"], box, mask: Mask, cut: Cut, begun, cap) -> Choices:
    P, query = len(box), lax.stop_gradient(query)

    def tile(i):
        rows = cut.rows(i)
        position = rows[0] + cut.offset
        position = position // rule.query_block * rule.query_block if mask.causal else position
        who = choosers(query, mask, rows, position, cut.offset)
        chosen = unless_begun(begun, who, cut.offset, lambda: choice(rule, who, box, mask, cap))
        return Choices(*read(rule, who.position, chosen, P, mask), chosen)

    return _each(tile, cut)


def _each(tile, cut: Cut):
    return lax.map(tile, jnp.arange(cut.count)) if cut.count > 1 else jax.tree.map(lambda x: x[None], tile(0))


def _by_gathering(rule: Selection, part: Inputs, pages: Pages, cut: Cut, choices: Choices, limit, *, certified: bool):
    """Output and odds, one tile after another."""
    mask, query, T = part.mask, part.query[0, 0], part.mask.num_queries
    room = jnp.zeros((query.shape[0], cut.count * cut.size, query.shape[2]), query.dtype)
    padded = lax.dynamic_update_slice_in_dim(room, query, cut.shift, axis=1)

    def tile(i):
        rows, at, exists = cut.rows(i), choices.at[i], choices.exists[i]
        own = lax.dynamic_slice_in_dim(padded, i * cut.size, cut.size, axis=1)
        bound = None if limit is None else limit[:, rows.clip(0, T - 1)]
        visible = functools.partial(_visible, rule, mask, rows, at, exists)
        found = attend(own, *_gathered(pages, at, mask), visible, part.soft_cap, bound)
        odds = _odds(own, rows, found, pages, at, exists, mask, part.soft_cap) if certified else None
        return found.output, odds

    return jax.tree.map(lambda x: aligned(x, cut.shift, T), _each(jax.checkpoint(tile), cut))


def _odds(own, rows, found: Found, pages: Pages, at, exists, mask: Mask, cap) -> Float[Array, "G R"]:
    read_whole = ((at[:, None] == jnp.arange(len(pages.box))[None]) & exists[:, None]).any(0)[None]
    return odds_of_the_rest(own, rows, found, pages, read_whole, mask, cap)


def _by_kernel(rule: Selection, part: Inputs, pages: Pages, cut: Cut, choices: Choices, limit, *, certified: bool):
    """The same in one call of the kernel, whose derivative is that of tiles which gather."""
    operands = {name: x for name in OPERANDS if (x := getattr(part, name)) is not None}
    arrays, form = jax.tree.flatten((part.mask, part.beta, pages.box, choices, limit))
    output, residual = _read(operands, arrays, form, rule)
    if not certified:
        return output, None
    query, seen, rows = lax.stop_gradient(part.query[0, 0]), residual > -jnp.inf, part.mask.num_queries
    found = Found(output, jnp.where(seen, residual, 0), seen.astype(residual.dtype))

    def tile(i):
        at = cut.rows(i).clip(0, rows - 1)
        some, own = Found(*(x[:, at] for x in found)), (choices.at[i], choices.exists[i])
        return _odds(query[:, at], cut.rows(i), some, pages, *own, part.mask, part.soft_cap)

    return output, aligned(_each(tile, cut), cut.shift, rows)


OPERANDS = ("query", "key", "value", "soft_cap")


# As in `attention.sparse.certified`, the mask travels as bare arrays.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _read(operands, arrays, form, rule: Selection):
    """Output, `G T E`, and log of the sum of exponentials, `G T`."""
    part, box, choices, _ = _built(operands, arrays, form)
    cut, T, P = _cut(rule, part.mask), part.mask.num_queries, len(box)
    each = jnp.arange(cut.count)[:, None]
    chosen = jnp.zeros((cut.count, P + 1), bool).at[each, jnp.where(choices.exists, choices.at, P)].set(True)
    by_row = chosen[:, :P].T[:, (jnp.arange(T) + cut.shift) // cut.size]
    return kernel.read(part, by_row[:, None], rule.block_size, None)


@_read.defjvp
def _read_jvp(form, rule: Selection, primals, tangents):
    operands, arrays = primals

    def gathering(operands):
        part, box, choices, limit = _built(operands, arrays, form)
        cut, P, C = _cut(rule, part.mask), len(box), rule.block_size
        rows = (jnp.pad(x[0, 0], ((0, P * C - x.shape[2]), (0, 0))) for x in (part.key, part.value))
        pages = Pages(*(x.reshape(P, C, -1) for x in rows), box)
        return _by_gathering(rule, part, pages, cut, choices, limit, certified=False)[0]

    output, tangent = jax.jvp(gathering, (operands,), (tangents[0],))
    _, residual = _read(operands, arrays, form, rule)
    return (output, residual), (tangent, jnp.zeros_like(residual))


def _built(operands, arrays, form):
    mask, beta, *rest = jax.tree.unflatten(form, arrays)
    return Inputs(mask=mask, beta=beta, **operands), *rest


def _gathered(pages: Pages, at: Int[Array, " n"], mask: Mask) -> tuple[Float[Array, "nC H"], Float[Array, "nC E"]]:
    """The keys and the values of the pages `at`, one after another; a page is copied as one row.

    Beyond the length, where a cache may hold anything, they are zeros.
    """
    P, C = pages.key.shape[:2]
    key, value = (
        jnp.take(x.reshape(P, -1), at, axis=0, mode="clip").reshape(at.size * C, -1) for x in (pages.key, pages.value)
    )
    if mask.key_lengths is None:
        return key, value
    there = (keys_of(at, C) < mask.key_lengths[0])[:, None]
    return jnp.where(there, key, jnp.zeros_like(key)), jnp.where(there, value, jnp.zeros_like(value))


def _visible(rule: Selection, mask: Mask, rows, at, exists) -> Bool[Array, "g R nC"]:
    """Which of the gathered keys each row sees."""
    keys = keys_of(at, rule.block_size)
    there = jnp.repeat(exists, rule.block_size) & (keys < mask.num_keys)
    return mask.at(rows, keys)[0, 0] & there[None, None]
