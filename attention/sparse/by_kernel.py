"""One key head by pages, read by the kernel in C: what every row reads is planned first, and then read in one call.

The kernel skips a page for 32 rows that do not read it, so that a row which reads much costs few others anything.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from attention.exponential import unit
from attention.sparse import diagonal, kernel
from attention.sparse.by_pages import Options, Result, certified, joined, planned, spans
from attention.sparse.kernel import Read
from attention.sparse.online import across, added, begun, finished, weighing
from attention.sparse.plan import Limits, Plan
from attention.sparse.reading import Head
from attention.tiles import divisor

ROOM = 2**24  # pairs of a row and a page that are planned before any of them is read


def attended(head: Head, own: Limits, options: Options, fits: Bool[Array, "G T"] | None) -> Result:
    """Every tile; `fits` says which rows are read in 16 bits, and `own` knows."""
    found, short = [], kernel.fitting(head.part, fits)
    for part, tiles in spans(head, options):
        count = divisor(len(tiles), max(1, ROOM // (len(part.pages.width) * own.size.shape[0] * options.rows)))
        some = functools.partial(_strip, part, own, options, short, count)
        found.append(lax.map(some, tiles.reshape(-1, count)[:, 0]))
    *rows, read, seen = jax.tree.map(lambda *x: jnp.concatenate(x), *found)
    return Result(*(joined(x) for x in rows), jnp.minimum(read.sum(), seen.sum()), seen.sum())


def _strip(head: Head, own: Limits, options: Options, fits, count: int, first):
    """Some tiles after one another: output, error bound, replaced mass, and pairs that are read and might be."""
    start, T, page = first * options.rows, count * options.rows, options.page
    part = kernel.rows_of(head.part, start, T)
    rows = None if fits is None else fits.rows
    own, rows = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, T, axis=1), (own, rows))
    fits = None if fits is None else fits._replace(rows=rows)
    at, P = start + jnp.arange(T), len(head.pages.width)
    fixed = diagonal.among(head.part.mask, at, options.rows, P, page)
    parts = [kernel.read(part, fixed, page, fits)] if diagonal.keys(head.part.mask, options.rows, page) else []
    known = parts[0][1] if parts else jnp.full_like(own.size, -jnp.inf)

    def tile(i):
        row = i * options.rows
        query, sofar, *limits = (
            lax.dynamic_slice_in_dim(x, row, options.rows, axis=1) for x in (part.query[0, 0], known, *own)
        )
        at = start + row + jnp.arange(options.rows)
        rows = planned(head, query, at, Limits(*limits), weighing(sofar.reshape(-1)), options)
        plan, (output, residual) = rows.plan, _of_means(head, rows.plan, rows.own)
        return plan.read, rows.visible.seen, plan.top, plan.error, plan.mass, output, residual

    read, seen, *numbers = lax.map(tile, jnp.arange(count))
    read, seen = (jnp.moveaxis(x, 0, 2).reshape(P, -1, T) for x in (read, seen))
    top, error, mass, *means = (joined(x) for x in numbers)
    output, residual = kernel.merged(*parts, (means[0], means[1]), kernel.read(part, read, page, fits))
    bound, mass = certified(own, error, mass, residual - top)
    around = kernel.pairs(jnp.broadcast_to(fixed, read.shape), page)
    pairs = kernel.pairs(read, page), kernel.pairs(jnp.broadcast_to(seen, read.shape), page)
    return output, bound, mass, *(around + x.astype(output.dtype) for x in pairs)


def _of_means(head: Head, plan: Plan, own: Limits) -> Read:
    """What the means of pages add up to."""
    P, G, R = plan.mean.shape

    def some():
        nothing = begun(own.size.reshape(-1), head.across.shape[0])
        logits, means = (x.reshape(P, -1) for x in (plan.logits, plan.mean))
        values = head.page * across(head.pages.value, logits.dtype)
        output, residual = finished(added(nothing, own.size.reshape(-1), logits * unit(logits.dtype), values, means))
        return output.reshape(G, R, -1), residual.reshape(G, R)

    shape, dtype = (G, R, head.across.shape[0] - 1), head.part.query.dtype
    return lax.cond(plan.mean.any(), some, lambda: (jnp.zeros(shape, dtype), jnp.full((G, R), -jnp.inf, dtype)))
