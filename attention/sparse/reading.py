"""Attention to the keys of some pages and the means of others: as a definition, and by online softmax over blocks.

A block is `BLOCK` keys or one page, whichever is more. A tile of queries reads the blocks that any of its rows wants;
a row gives no weight to the pages that it does not read itself, so that its output depends on no other row.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.exact import softmax
from attention.exponential import power, unit
from attention.inputs import Inputs
from attention.logits import soft_capped
from attention.masks import slice_or_keep
from attention.rounding import CALM, product
from attention.sparse.moments import Moments
from attention.sparse.plan import Limits, Plan, Visible

BLOCK = 512  # keys of a product: fewer would run on one thread of a CPU


class Head(NamedTuple):
    """One key head of one batch element: what a tile of its queries reads from.

    Attributes:
        part: its operands, `1 1 ...`, padded to whole tiles and blocks.
        pages: its moments.
        growing: the mean of each key and of those before it in its page.
        across: the values across, with a last row of ones, `E+1 S`; then one product gives numerator and denominator.
    """

    part: Inputs
    pages: Moments
    growing: Float[Array, "S H"]
    across: Float[Array, "F S"]


def padded(inputs: Inputs, rows: int, cols: int) -> Inputs:
    """The inputs with as many more queries and keys, none of which sees or is seen, as fill tiles of rows by cols."""
    mask, T, S = inputs.mask, inputs.mask.num_queries, inputs.mask.num_keys
    more_rows, more_cols = -T % rows, -S % cols
    if not more_rows and not more_cols:
        return inputs

    def grown(x, axes, least: int = 0):
        """Padded with zeros along `axes`, but for those of a size of at most `least`, which stand for every index."""
        if x is None:
            return None
        return jnp.pad(x, [(0, axes.get(n, 0) if size > least else 0) for n, size in enumerate(x.shape)])

    known = [x.shape[0] for x in (mask.offset, mask.query_lengths, mask.key_lengths, mask.dense) if x is not None]
    batch = max(known, default=1)  # as many as the mask has, of which one may stand for all
    lengths = {
        "query_lengths": jnp.full((batch,), T) if mask.query_lengths is None else mask.query_lengths,
        "key_lengths": jnp.full((batch,), S) if mask.key_lengths is None else mask.key_lengths,
    }
    tables = {3: more_rows, 4: more_cols}
    mask = dataclasses.replace(
        mask,
        num_queries=T + more_rows,
        num_keys=S + more_cols,
        query_segments=grown(mask.query_segments, {1: more_rows}),
        key_segments=grown(mask.key_segments, {1: more_cols}),
        dense=grown(mask.dense, tables, least=1),
        **lengths,
    )
    return dataclasses.replace(
        inputs,
        query=grown(inputs.query, {3: more_rows}),
        key=grown(inputs.key, {2: more_cols}),
        value=grown(inputs.value, {2: more_cols}),
        bias=grown(inputs.bias, tables, least=1),
        mask=mask,
    )


def definition(head: Head, plan: Plan, row, rows: int) -> Float[Array, "G T E"]:
    """Softmax over the mean keys of some pages, each as often as the page has keys, and the keys of others."""
    part, P = head.part, head.pages.key.shape[0]
    size, query = part.mask.num_keys // P, lax.dynamic_slice_in_dim(part.query, row, rows, axis=3)[0, 0]
    means = product("GTH,PH->PGT", query, head.pages.key)
    means = jnp.moveaxis(jnp.where(plan.mean, means + jnp.log(size), -jnp.inf), 0, 2)
    keys = part.masked_scores(row, rows, 0, part.mask.num_keys)[0, 0]
    keys = jnp.where(jnp.moveaxis(jnp.repeat(plan.read, size, axis=0), 0, 2), keys, -jnp.inf)
    weights = softmax(jnp.concatenate([means, keys], axis=-1))
    values = jnp.concatenate([head.pages.value, part.value[0, 0].astype(query.dtype)])
    return product("GTS,SE->GTE", weights, values)


class Found(NamedTuple):
    """A tile's output, log of its sum of exponentials less the plan's top, and the blocks it read and might have."""

    output: Float[Array, "G T E"]
    residual: Float[Array, "G T"]
    read: Float[Array, ""]
    seen: Float[Array, ""]


def online(head: Head, plan: Plan, visible: Visible, own: Limits, row, rows: int) -> Found:
    """The same block by block, reading those that a row wants."""
    part, dtype = head.part, head.part.query.dtype
    S, P = part.mask.num_keys, head.pages.key.shape[0]
    page = S // P
    C = block(S, page)
    G, H = part.query.shape[2], part.query.shape[-1]
    N, count = G * rows, S // C
    query = lax.dynamic_slice_in_dim(part.query, row, rows, axis=3).reshape(N, H).T

    reads, means, logits = (x.reshape(P, N) for x in (plan.read, plan.mean, plan.logits))
    whole, seen = (jnp.broadcast_to(x, (P, G, rows)).reshape(P, N) for x in (visible.whole, visible.seen))
    calm = (own.size <= CALM).reshape(N)
    level = jnp.where(calm, own.size.reshape(N) * unit(dtype), -jnp.inf)
    wanted = reads.reshape(count, C // page, N)
    clear = (wanted & whole.reshape(wanted.shape)).all((1, 2))
    some = wanted.any((1, 2))
    order = jnp.nonzero(some, size=count, fill_value=0)[0]

    def add(carry, raw, values, shown):
        """One step of online softmax: `raw` in units, C N; `values`, F C; `shown`, C N or None where all is."""
        level, sums = carry
        masked = raw if shown is None else jnp.where(shown, raw, -jnp.inf)
        largest = lax.cond(calm.all(), lambda: level, lambda: jnp.maximum(level, masked.max(0)))
        higher = jnp.where(calm, level, largest)
        finite = jnp.where(jnp.isneginf(higher), 0, higher)
        kept = power(level - finite)
        gained = product("FS,SN->FN", values, power(masked - finite[None]))
        return higher, sums * kept[None] + gained

    def from_means(carry):
        values = page * jnp.concatenate([head.pages.value.T, jnp.ones((1, P), dtype)])
        return add(carry, logits * unit(dtype), values, means)

    def from_block(i, carry):
        j = order[i]
        key = lax.dynamic_slice_in_dim(part.key[0, 0], j * C, C).astype(dtype)
        values = lax.dynamic_slice_in_dim(head.across, j * C, C, axis=1)
        raw = _scores(part, key, query, row, rows, j * C, C)

        def shown():
            mask = part.mask.tile_by_key(row, rows, j * C, C)[0, 0]
            mask = jnp.broadcast_to(mask, (C, G, rows)).reshape(C // page, page, N)
            return (mask & wanted[j][:, None]).reshape(C, N)

        return lax.cond(clear[j], lambda c: add(c, raw, values, None), lambda c: add(c, raw, values, shown()), carry)

    carry = level, jnp.zeros((head.across.shape[0], N), dtype)
    carry = lax.cond(means.any(), from_means, lambda c: c, carry)
    level, sums = lax.fori_loop(0, some.sum(), from_block, carry)
    total = sums[-1]
    output = (sums[:-1] / jnp.where(total > 0, total, 1)[None]).T.reshape(G, rows, -1)
    residual = (jnp.log(total) + level / unit(dtype)).reshape(G, rows) - plan.top
    might = seen.reshape(wanted.shape).any((1, 2))
    return Found(output, residual, some.sum().astype(dtype), might.sum().astype(dtype))


def block(keys: int, page: int) -> int:
    """Keys read at once: as many whole pages as make BLOCK, no more than there are."""
    pages = -(-keys // page)
    return page * max(1, min(pages, BLOCK // page))


def _scores(part: Inputs, key, query, row, rows: int, col, cols: int):
    """The logits of a block in units of `exponential.unit`, C N."""
    scaled = part.soft_cap is None and part.bias is None
    key = key * unit(key.dtype) if scaled else key
    raw = product("SH,HN->SN", key, query)
    if scaled:
        return raw
    raw = soft_capped(raw, part.soft_cap)
    if part.bias is not None:
        bias = slice_or_keep(slice_or_keep(part.bias, row, rows, 3), col, cols, 4)[0, 0]
        bias = jnp.broadcast_to(bias, (part.query.shape[2], rows, cols)).astype(raw.dtype)
        raw = raw + jnp.moveaxis(bias, 2, 0).reshape(cols, -1)
    return raw * unit(raw.dtype)
