"""One key head by pages: tile after tile, and then the rows that would have made their tiles read much for them alone.

A row that reads more than `MANY` keys in whole pages, where few rows of the tile before do, is late: its tile leaves it
out, and it is read with others of its kind. What it sees and the rows before it decide that, so that no later token
moves a bit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.sparse import diagonal
from attention.sparse.bounds import REACH
from attention.sparse.moments import Moments, moments
from attention.sparse.online import Partial, across, begun, finished, resumed
from attention.sparse.plan import Limits, Plan, plan
from attention.sparse.reading import Found, Head, Rows, definition, online
from attention.sparse.rows import block
from attention.sparse.visible import Visible, visible_pages

READ = 256  # keys of a block: with 512 rows a product of less would run on one thread of a CPU
MANY = 256  # keys in whole pages, beyond which a row is late
LATE_ROWS, LATE_READ = 128, 1024  # of a tile of late rows
SPANS, PAGES = 4, 64  # parts of causal tiles, and pages from which on there are so many
LATE = 16  # at most one row in so many is late
RARE = 8  # and none where more than one in so many of the tile before reads as much


class Options(NamedTuple):
    """Keys of a page, rows of a tile, the tolerance and the bound of `attention.Certified`."""

    page: int
    rows: int
    tolerance: float
    bound: str


class Result(NamedTuple):
    """Output, error bound, replaced mass, and the pairs of row and key that were read and that might have been."""

    output: Float[Array, "G T E"]
    error: Float[Array, "G T"]
    mass: Float[Array, "G T"]
    read: Float[Array, ""]
    seen: Float[Array, ""]


def head_of(part: Inputs, options: Options, pages: Moments | None = None) -> Head:
    """What the tiles of a key head read from; of pages that no row sees whole the moments may be anything finite."""
    dtype = part.query.dtype
    key, value = (x[0, 0].astype(dtype) for x in (part.key, part.value))
    if pages is None:
        pages = moments(key, value, options.page, bound=options.bound)
    return Head(part, pages, across(value, dtype), options.page)


def attended(head: Head, own: Limits, options: Options) -> Result:
    """Every tile online, and then the late rows."""
    G, T = head.part.query.shape[2:4]
    size = block(len(head.pages.width), options.page, READ)
    most = T // LATE if head.part.mask.num_keys > MANY else 0
    fixed = diagonal.keys(head.part.mask, options.rows, options.page) * G * options.rows

    def tile(head, before, i):
        rows = _tile(head, own, options, i * options.rows)
        (number, rare), wide = before, (rows.plan.read & rows.visible.whole).sum(0) * options.page > MANY
        late = wide & rare[:, None]
        number = number[:, None] + _counted(late)
        late &= number <= most
        rows = rows._replace(plan=_without(rows.plan, late))
        found = online(head, rows, size)
        near = (x.reshape(late.shape) for x in (rows.begun.level, rows.begun.sums[-1]))
        numbers = found.output, *_certified(rows, found), late, *near
        return (number[:, -1], RARE * wide.sum(1) <= options.rows), (*numbers, found.read + fixed, found.seen + fixed)

    before, parts = (jnp.zeros(G, jnp.int32), jnp.zeros(G, bool)), []
    for part, tiles in spans(head, options):
        before, found = lax.scan(functools.partial(tile, part), before, tiles)
        parts.append(found)
    *numbers, read, seen = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    *results, late, level, total = (joined(x) for x in numbers)
    if most:
        results, more = _late(head, own, options, results, late, (level, total))
        read = read.sum() + more
    return Result(*results, jnp.minimum(read.sum(), seen.sum()), seen.sum())


def _counted(which: Bool[Array, "G R"]) -> Int[Array, "G R"]:
    """How many up to each: in log2(R) steps, where a cumulative sum on a CPU takes R^2 operations."""
    return lax.associative_scan(jnp.add, which.astype(jnp.int32), axis=1)


def spans(head: Head, options: Options) -> list[tuple[Head, Int[Array, " n"]]]:
    """The tiles in as many parts as pay, with what each of them can see: where causal, later ones see more pages."""
    mask, tiles = head.part.mask, head.part.mask.num_queries // options.rows
    size = block(len(head.pages.width), options.page, LATE_READ)
    if not mask.causal or mask.offset is not None or len(head.pages.width) < PAGES:
        return [(head, jnp.arange(tiles))]
    ends = [tiles * (n + 1) // SPANS for n in range(SPANS)]
    reach = [min(mask.num_keys, -(-end * options.rows // size) * size) for end in ends]
    parts = zip([0, *ends], ends, reach, strict=False)
    return [(head.before(keys), jnp.arange(start, end)) for start, end, keys in parts if start < end]


def defined(head: Head, own: Limits, options: Options) -> Float[Array, "G T E"]:
    """The output with a derivative; rows are the same in tiles and late."""

    def tile(i):
        return definition(head, _tile(head, own, options, i * options.rows))

    return joined(lax.map(jax.checkpoint(tile), jnp.arange(head.part.mask.num_queries // options.rows)))


def _late(head: Head, own: Limits, options: Options, results: list, late: Bool[Array, "G T"], near):
    """The results with those of late rows, of any query heads, and the pairs that these read.

    Their tiles found what the keys around the diagonal add up to; `near` has the levels and the sums of its weights.
    """
    G, T, H = head.part.query.shape[2:]
    size, N = block(len(head.pages.width), options.page, LATE_READ), G * T
    # By time and then by head, so that a row's place says nothing of what comes after it.
    order = jnp.nonzero(late.T.reshape(-1), size=-(-(N // LATE) // LATE_ROWS) * LATE_ROWS, fill_value=N)[0]
    order = jnp.where(order < N, order % G * T + order // G, N)
    query, limits = head.part.query[0, 0].reshape(1, N, H), Limits(*(x.reshape(1, N) for x in own))
    near = *(x.reshape(N) for x in near), results[0].reshape(N, -1)

    def some(i, carry):
        results, read = carry
        n = lax.dynamic_slice_in_dim(order, i * LATE_ROWS, LATE_ROWS)
        each = n.clip(0, N - 1)
        mine = Limits(*(x[:, each] for x in limits))
        sofar = resumed(*(x[each] for x in near))
        rows = planned(head, query[:, each], each % T, mine, sofar, options)
        rows = rows._replace(plan=_without(rows.plan, (n == N)[None]))
        found = online(head, rows, size)
        new = (found.output, *_certified(rows, found))
        results = [old.at[n].set(x[0], mode="drop") for old, x in zip(results, new, strict=True)]
        return results, read + found.read

    flat = [x.reshape(N, *x.shape[2:]) for x in results]
    flat, read = lax.fori_loop(0, -(-late.sum() // LATE_ROWS), some, (flat, jnp.zeros((), query.dtype)))
    return [x.reshape(G, T, *x.shape[1:]) for x in flat], read


def _tile(head: Head, own: Limits, options: Options, row) -> Rows:
    """The rows of a tile and their plan."""
    query, *limits = (lax.dynamic_slice_in_dim(x, row, options.rows, axis=1) for x in (head.part.query[0, 0], *own))
    size, across = limits[Limits._fields.index("size")].reshape(-1), lax.stop_gradient(head.across)
    sofar = begun(size, len(across))
    if diagonal.keys(head.part.mask, options.rows, options.page):
        flat = lax.stop_gradient(query).reshape(len(size), -1).T
        part = lax.stop_gradient(head.part)
        sofar = diagonal.read(sofar, part, across, flat, size, row, options.rows, options.page)
    return planned(head, query, row + jnp.arange(options.rows), Limits(*limits), sofar, options)


def planned(head: Head, query, at, own: Limits, sofar: Partial, options: Options) -> Rows:
    """The plan of some rows, of which `sofar` has been read; it has no derivative."""
    (pages, still), P = lax.stop_gradient((head.pages, query)), len(head.pages.width)
    fixed = diagonal.among(head.part.mask, at, options.rows, P, options.page)
    visible = Visible(*(x & ~fixed for x in visible_pages(head.part.mask, at, P, options.page)))
    known = finished(sofar)[1].reshape(own.size.shape)
    limits = {"size": options.page, "tolerance": options.tolerance, "reach": REACH[options.bound]}
    return Rows(query, at, own, visible, fixed, sofar, plan(still, pages, visible, known, own, **limits))


def _without(chosen: Plan, left: Bool[Array, "G R"]) -> Plan:
    """The plan of rows of which some read nothing here."""
    return chosen._replace(read=chosen.read & ~left[None], mean=chosen.mean & ~left[None])


def _certified(rows: Rows, found: Found) -> tuple[Float[Array, "G R"], Float[Array, "G R"]]:
    return certified(rows.own, rows.plan.error, rows.plan.mass, found.residual)


def certified(own: Limits, error, mass, residual) -> tuple[Float[Array, "*G R"], Float[Array, "*G R"]]:
    """The error bound and a bound on the replaced mass, from those of the plan, in units of e^top, as `residual` is.

    The true sum of exponentials is no less than the sum found, but for rounding: a mean's part is a lower bound.
    """
    relative = own.odds * jnp.exp(-residual)
    tail, mass = (jnp.where(x > 0, x * relative, 0) for x in (error, mass))
    bound = 1.001 * tail + own.rounding
    return jnp.where(jnp.isnan(bound), jnp.inf, bound), jnp.fmin(mass, 1)


def joined(x: Array) -> Array:
    """The rows of all tiles after one another: `G T ...` from `count G rows ...`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
