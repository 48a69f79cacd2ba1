"""How one key head is attended to: by pages, by the moments of all keys, or by every key, decided before a key is read.

Where all queries see the same keys, the head decides for all its rows together; elsewhere each row decides by what it
sees.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.inputs import Inputs
from attention.native.build import has_halves
from attention.rounding import CALM, norms, sizes
from attention.sparse import by_kernel, by_pages, diagonal, far, kernel, order, whole
from attention.sparse.bounds import value_reach, value_width
from attention.sparse.by_pages import Options, Result
from attention.sparse.kernel import Short
from attention.sparse.moments import Moments, outward
from attention.sparse.outlook import hopeless
from attention.sparse.padding import padded
from attention.sparse.plan import Limits, limits_of
from attention.sparse.rows import block
from attention.sparse.visible import alike, first_keys, regular

SHARE = 0.75  # of the tolerance, that rounding to 16 bits may take where pages are left out


def attended(inputs: Inputs, options: Options, pages: Moments | None = None, *, defined: bool) -> Result:
    """All key heads, `B K G T ...`; if `defined`, in a form that has a derivative, of which the output alone counts.

    `pages` has the moments of pages that a query sees whole, `B K P ...`, where they are known.
    """
    (B, K, G, T), P = inputs.query.shape[:4], -(-inputs.mask.num_keys // options.page)
    options = options._replace(rows=min(T, max(1, options.rows // G)))
    inputs = padded(inputs, options.rows, options.page * min(P, max(1, by_pages.LATE_READ // options.page)))
    pages = jax.tree.map(lambda x: _lengthened(x, inputs.mask.num_keys // options.page, inputs.query.dtype), pages)
    bounds = lax.stop_gradient(_limits(inputs, options))

    def head(n):
        b, k = n // K, n % K
        own, added, mine = jax.tree.map(lambda x: x[b, k], (*bounds, pages))
        return _head(inputs.part(b, 1, k, 1), own, added, options, mine, defined=defined)

    # Without a checkpoint JAX 0.10.2 transposes a loop over heads that take different ways wrongly: the tests of
    # polynomials of degree 2 then find cotangents that belong to none of them.
    each = jax.checkpoint(head) if defined else head
    found = lax.map(each, jnp.arange(B * K))
    rows = (x.reshape(B, K, G, -1, *x.shape[3:])[:, :, :, :T] for x in found[:3])
    return Result(*rows, found.read.sum(), found.seen.sum())


def _limits(inputs: Inputs, options: Options) -> tuple[Limits, Short | None]:
    """The limits of every query, whichever way its head takes, and what reading in 16 bits adds where that may pay."""
    (pages, near) = inputs.mask.num_keys // options.page, diagonal.keys(inputs.mask, options.rows, options.page)
    # By each block, the means, the diagonal, and where what was found of this is divided and multiplied again.
    rescalings = pages * options.page // block(pages, options.page, by_pages.READ) + 3
    # The moments of all keys mend rows by one sum over all of them; elsewhere sums are over a block and over blocks.
    longest = max(by_pages.LATE_READ, whole.BLOCK, options.page, pages, near)
    in_c, of, reach = kernel.able(inputs, options.page), sizes(inputs), value_reach(inputs)
    if in_c:
        rescalings = max(rescalings, kernel.rescalings(inputs.mask.num_keys, options.page))
    depth = None if far.degrees(inputs) else longest + rescalings
    own = limits_of(of, reach, options.page, rescalings=rescalings, fixed_shift=CALM, depth=depth)
    own = own._replace(width=jnp.broadcast_to(value_width(inputs), own.width.shape))
    if not (in_c and has_halves() and inputs.soft_cap is None and options.tolerance > kernel.RHO / 2):
        return own, None
    return own, kernel.short(of, inputs.value, inputs.mask, own.diameter, own.rounding)


def _lengthened(x: Float[Array, "B K P *H"], pages: int, dtype) -> Float[Array, "B K Q *H"]:
    """With zeros for more pages."""
    return jnp.pad(x.astype(dtype), [(0, pages - x.shape[2] if n == 2 else 0) for n in range(x.ndim)])


def _head(
    part: Inputs, own: Limits, added: Short | None, options: Options, pages: Moments | None, *, defined: bool
) -> Result:
    """One key head."""
    if not (options.tolerance and regular(part)):
        return _whole(part, own, added, options, defined=defined)
    if not alike(part):
        return _by_pages(part, own, added, options, pages, defined=defined)
    return _by_choice(part, own, added, options, defined=defined)


def _by_choice(part: Inputs, own: Limits, added: Short | None, options: Options, *, defined: bool) -> Result:
    """One key head whose queries all see the same keys."""
    page, tolerance, still = options.page, options.tolerance, lax.stop_gradient(part)
    width = apart(still.value[0, 0].astype(part.query.dtype), jnp.arange(part.mask.num_keys) < first_keys(part))
    own = own._replace(width=jnp.broadcast_to(width, own.width.shape))
    dense = hopeless(still, own, page, width, tolerance)
    look = order.looked(part, page) if order.pays(part, page) else None

    def pages():
        if look is None:
            return _by_pages(part, own, added, options, defined=defined)
        moved, limits, more, back = order.ordered(part, own, added, look, page)
        result = _by_pages(moved, limits, more, options, defined=defined)
        return Result(*(back(x) for x in result[:3]), *result[3:])

    ways = [pages, lambda: _whole(part, own, added, options, defined=defined)]
    way = (dense if look is None else dense & ~look.sorts).astype(jnp.int32)
    if degrees := far.degrees(part):
        # What the way so far may take, if reading every key by JAX takes 1.
        reading = kernel.cost(part, page, _shortened(own, added, tolerance)[1])
        least = jnp.where(way == 1, reading, jnp.minimum(reading, far.WORTH))
        for degree, cost in zip(degrees, far.costs(still, width, tolerance), strict=True):
            way, least = jnp.where(cost < least, len(ways), way), jnp.minimum(cost, least)
            ways.append(functools.partial(_by_moments, part, own, width, options, degree=degree, defined=defined))
    return lax.switch(way, ways)


def apart(value: Float[Array, "S E"], seen: Bool[Array, " S"]) -> Float[Array, ""]:
    """The distance of two of the values that are seen, rounded inward: a lower bound on the largest.

    The value farthest from the mean, and the one farthest from that: at least half of the largest distance, since the
    mean is no farther from the first than every value is. O(S E).
    """
    mean = jnp.where(seen[:, None], value, 0).sum(0) / jnp.maximum(seen.sum(), 1)
    first = value[jnp.where(seen, ((value - mean[None]) ** 2).sum(-1), -1).argmax()]
    return jnp.where(seen, norms(value - first[None]), 0).max() / outward(value.dtype, value.shape[-1])


def _whole(part: Inputs, own: Limits, added: Short | None, options: Options, *, defined: bool) -> Result:
    """Every key that is seen."""
    if defined:
        return _output(whole.defined(part, options.rows), own)
    if kernel.able(part, options.page):
        own, fits = _shortened(own, added, options.tolerance)
        output, pairs = whole.by_kernel(part, fits)
    else:
        output, pairs = whole.attended(part, own, block(part.mask.num_keys // options.page, options.page, whole.BLOCK))
    return Result(output, own.rounding, jnp.zeros_like(own.rounding), pairs, pairs)


def _by_pages(
    part: Inputs, own: Limits, added: Short | None, options: Options, pages: Moments | None = None, *, defined: bool
) -> Result:
    """Pages that are read, and means of others."""
    head = by_pages.head_of(part, options, pages)
    own, fits = _shortened(own, added, SHARE * options.tolerance)
    if defined:
        return _output(by_pages.defined(head, own, options), own)
    if kernel.able(part, options.page):
        return by_kernel.attended(head, own, options, fits)
    return by_pages.attended(head, own, options)


def _shortened(own: Limits, added: Short | None, tolerance: float) -> tuple[Limits, Bool[Array, "G T"] | None]:
    """The limits where rows are read in 16 bits whose error is then within a tolerance, and which rows these are."""
    return (own, None) if added is None else kernel.shortened(own, added, tolerance * own.width)


def _by_moments(part: Inputs, own: Limits, width, options: Options, *, degree: int, defined: bool) -> Result:
    """All keys at once, but for some rows."""
    *found, share = far.attended(part, own, width, tolerance=options.tolerance, degree=degree, defined=defined)
    pairs = jnp.asarray(part.mask.num_queries * part.mask.num_keys, share.dtype)
    return Result(*found, share * pairs, pairs)


def _output(x, own: Limits) -> Result:
    """A result of which the output alone counts."""
    nothing = jnp.zeros_like(own.rounding)
    return Result(x, nothing, nothing, nothing[0, 0], nothing[0, 0])
