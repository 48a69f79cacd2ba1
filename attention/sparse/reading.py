"""Attention of a tile of rows to the keys of some pages and the means of others: as a definition, and by blocks.

A tile reads the blocks that any of its rows wants; a row gives no weight to the pages that it does not read itself.
Blocks lie where they lie whatever is wanted, so that a row's sums are those of its own pages, bit for bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.exact import softmax
from attention.exponential import unit
from attention.inputs import Inputs
from attention.rounding import product
from attention.sparse.moments import Moments
from attention.sparse.online import Partial, across, added, finished
from attention.sparse.plan import Limits, Plan
from attention.sparse.visible import Visible


class Head(NamedTuple):
    """One key head of one batch element: what a tile of its queries reads from.

    Attributes:
        part: its operands, `1 1 ...`, padded to whole tiles and blocks.
        pages: the moments of its pages, or of the first of them that a tile can see.
        across: the values across, with a last row of ones.
        page: keys of a page.
    """

    part: Inputs
    pages: Moments
    across: Float[Array, "F S"]
    page: int

    def before(self, keys: int) -> "Head":
        """What the queries read that see no more than the first `keys` keys."""
        pages = jax.tree.map(lambda x: x[: -(-keys // self.page)], self.pages)
        return self._replace(pages=pages)


class Rows(NamedTuple):
    """The rows of a tile.

    Attributes:
        query, at, own: queries, their places and their limits.
        visible: what they see of the pages that they do not read in any case.
        fixed: those that they do (`attention.sparse.diagonal`).
        begun: what these add up to.
        plan: what becomes of the others.
    """

    query: Float[Array, "G R H"]
    at: Int[Array, " R"]
    own: Limits
    visible: Visible
    fixed: Bool[Array, "P 1 R"]
    begun: Partial
    plan: Plan


def definition(head: Head, rows: Rows) -> Float[Array, "G R E"]:
    """Softmax over the mean keys of some pages, each as often as the page has keys, and the keys of others."""
    part, plan, S = head.part, rows.plan, head.page * len(head.pages.width)
    means = product("GTH,PH->PGT", rows.query, head.pages.key)
    means = jnp.moveaxis(jnp.where(plan.mean, means + jnp.log(head.page), -jnp.inf), 0, 2)
    keys = product("GTH,SH->GTS", rows.query, part.key[0, 0, :S].astype(rows.query.dtype))
    read = jnp.repeat(plan.read | rows.fixed, head.page, axis=0)
    seen = part.mask.at(rows.at, jnp.arange(S))[0, 0] & jnp.moveaxis(read, 0, 2)
    weights = softmax(jnp.concatenate([means, jnp.where(seen, keys, -jnp.inf)], axis=-1))
    values = jnp.concatenate([head.pages.value, part.value[0, 0, :S].astype(keys.dtype)])
    return product("GTS,SE->GTE", weights, values)


class Found(NamedTuple):
    """A tile's output, log of its sum of exponentials less the plan's top, and the pairs that it read and might have.

    A pair is a row and a key, counted by whole blocks.
    """

    output: Float[Array, "G R E"]
    residual: Float[Array, "G R"]
    read: Float[Array, ""]
    seen: Float[Array, ""]


def online(head: Head, rows: Rows, block: int) -> Found:
    """The same from what has begun, block by block, reading those of `block` keys that a row wants."""
    part, dtype, plan = head.part, head.part.query.dtype, rows.plan
    G, R, H = rows.query.shape
    N, P, each = G * R, head.pages.key.shape[0], block // head.page
    query, size = rows.query.reshape(N, H).T, rows.own.size.reshape(N)
    means, logits = (x.reshape(P, N) for x in (plan.mean, plan.logits))
    whole, seen = (jnp.broadcast_to(x, (P, G, R)) for x in (rows.visible.whole, rows.visible.seen))
    wanted = plan.read.reshape(-1, each, N)
    some, clear = wanted.any((1, 2)), (plan.read & whole).reshape(wanted.shape).all((1, 2))
    order = jnp.nonzero(some, size=len(some), fill_value=0)[0]

    def from_means(found: Partial) -> Partial:
        values = head.page * across(head.pages.value, dtype)
        return added(found, size, logits * unit(dtype), values, means)

    def from_block(i, found: Partial) -> Partial:
        j = order[i]
        key = lax.dynamic_slice_in_dim(part.key[0, 0], j * block, block).astype(dtype)
        values = lax.dynamic_slice_in_dim(head.across, j * block, block, axis=1)
        raw = product("SH,HN->SN", key * unit(dtype), query)

        def shown():
            mask = jnp.moveaxis(part.mask.at(rows.at, j * block + jnp.arange(block))[0, 0], 2, 0)
            mask = jnp.broadcast_to(mask, (block, G, R)).reshape(each, head.page, N)
            return (mask & wanted[j][:, None]).reshape(block, N)

        return lax.cond(
            clear[j], lambda x: added(x, size, raw, values, None), lambda x: added(x, size, raw, values, shown()), found
        )

    found = lax.cond(means.any(), from_means, lambda x: x, rows.begun)
    found = lax.fori_loop(0, some.sum(), from_block, found)
    output, residual = finished(found)
    might = seen.reshape(wanted.shape).any((1, 2)).sum()
    pairs = [x.astype(dtype) * (block * N) for x in (some.sum(), might)]
    return Found(output.reshape(G, R, -1), residual.reshape(G, R) - plan.top, *pairs)
