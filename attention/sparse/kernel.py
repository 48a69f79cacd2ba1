"""Keys read by the kernel in C where there is one: in float32, or in 16 bits where the tolerance has room for it.

In 16 bits a logit moves by at most D, a weight by a relative rho and a value by its own rounding, so that beside what
float32 loses

    |error| <= (tanh(D / 2) + rho / 2) diam(V) + max |v_j - v_j^|.

`docs/bounds.md` derives it. Which rows are read so is decided by what each sees: no later token, and no row beside it,
moves a bit.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.inputs import Inputs
from attention.masks import Mask, slice_or_keep
from attention.native import build, reading
from attention.native.calls import FEW
from attention.rounding import Sizes, max_over_visible, norms, roundoff
from attention.sparse.moments import outward
from attention.sparse.plan import Limits

ROWS = 32  # for which it reads a page or does not
IN_32, IN_16 = 0.7, 0.4  # of the time that reading takes without the kernel, in float32 and in 16 bits
MERGED = 5  # rescalings that stand for what merging its sums with others costs, and levels that are whole numbers
RHO = 1.02 * roundoff(jnp.bfloat16)  # of a weight: of its polynomial, of float32 and of the last rounding

Read = tuple[Float[Array, "*G E"], Float[Array, "*G"]]


class Short(NamedTuple):
    """What reading in 16 bits adds: to the error, and as a factor to the odds of what is left out."""

    error: Float[Array, "B K G T"]
    odds: Float[Array, "B K G T"]


def able(inputs: Inputs, page: int) -> bool:
    """Whether the kernel can read some pages of these operands."""
    single = inputs.query.dtype == jnp.float32 and inputs.bias is None
    fits = page % reading.UNIT == 0 and inputs.mask.num_queries > FEW
    return single and fits and jax.default_backend() == "cpu" and not build.fault()


def able_step(query: Float[Array, "B K G H"], key: Float[Array, "B K P C H"]) -> bool:
    """Whether the kernel can read lists of pages for one query a head."""
    single = query.dtype == jnp.float32 and key.shape[3] % reading.UNIT == 0
    return single and jax.default_backend() == "cpu" and not build.fault()


def cost(inputs: Inputs, page: int, fits: Bool[Array, "G T"] | None) -> Float[Array, ""]:
    """How long reading every key takes, if it takes 1 without the kernel; no bound relies on it."""
    if not able(inputs, page):
        return jnp.ones(())
    return jnp.asarray(IN_32) if fits is None else IN_32 + (IN_16 - IN_32) * fits.mean(dtype=jnp.float32)


def rescalings(keys: int, page: int) -> int:
    """How often the kernel rescales the sums of a row, and who merges it with others."""
    return -(-keys // min(build.KEYS, page)) + 3 + MERGED


def short(of: Sizes, value: Float[Array, "B K S E"], mask: Mask, diameter, rounding) -> Short:
    """What 16 bits add, from the sizes of the operands, the values, and what is known in float32."""
    dtype = of.query.dtype
    relative = 0.51 * of.head**0.5 / reading.WHOLE  # of a vector of integers: half a unit of each entry, and a hair
    moved = (2 * relative + relative**2) * of.query * of.key
    moved += 4 * reading.WHOLE * float(jnp.finfo(dtype).tiny) * (of.query + of.key)  # scales that vanish count as 0
    value = value.astype(dtype)
    apart = value * (2.0**16 + 1)  # Veltkamp's: what is left of it has the 8 bits of a bfloat16, without a conversion
    lost = norms(value - (apart - (apart - value))) * outward(dtype, value.shape[-1])
    lost = max_over_visible(mask, lost) + float(jnp.finfo(dtype).tiny) * value.shape[-1]
    error = 1.001 * ((jnp.tanh(moved / 2) + 0.51 * RHO) * diameter + lost) + 0.01 * rounding
    return Short(error, jnp.exp(2 * moved) * (1 + RHO) / (1 - RHO))


def shortened(own: Limits, added: Short, allowed: Float[Array, "*B G T"]) -> tuple[Limits, Bool[Array, "*B G T"]]:
    """The limits of rows of which those are read in 16 bits whose error is then no more than allowed; and which."""
    fits = own.rounding + added.error <= allowed
    error, odds = (jnp.where(fits, x, y) for x, y in ((added.error, 0), (added.odds, 1)))
    return own._replace(rounding=own.rounding + error, odds=own.odds * odds), fits


def rows_of(part: Inputs, start, count: int) -> Inputs:
    """The operands of some of the queries, which stand where they stood."""
    mask = part.mask

    def cut(x, axis: int):
        return None if x is None else lax.dynamic_slice_in_dim(x, start, count, axis=axis)

    banded = mask.causal or mask.window is not None
    offset = jnp.zeros(1, jnp.int32) if mask.offset is None else mask.offset
    mask = dataclasses.replace(
        mask,
        num_queries=count,
        offset=offset + start if banded else mask.offset,
        query_lengths=None if mask.query_lengths is None else mask.query_lengths - start,
        query_segments=cut(mask.query_segments, 1),
        dense=None if mask.dense is None else slice_or_keep(mask.dense, start, count, 3),
    )
    return dataclasses.replace(part, query=cut(part.query, 3), mask=mask)


class Fitting(NamedTuple):
    """Which rows are read in 16 bits, `G T`, and the keys and values of the head in as many."""

    rows: Bool[Array, "G T"]
    keys: reading.HalfKeys


def fitting(part: Inputs, rows: Bool[Array, "G T"] | None) -> Fitting | None:
    """Made once a head, whatever calls read from it."""
    return None if rows is None else Fitting(rows, reading.half_keys(part))


def read(part: Inputs, pages: Bool[Array, "P g T"], page: int, fits: Fitting | None) -> Read:
    """Output and log of the sum of exponentials of one key head over the pages that each row reads.

    Args:
        part: its operands, `1 1 ...`.
        pages: which of its rows read a page, of all query heads alike or of each.
        page: keys of a page.
        fits: what is read in 16 bits; None for nothing.
    """
    G, T = part.query.shape[2:4]
    pages = jnp.broadcast_to(jnp.moveaxis(pages, 0, 1), (G, len(pages), T))

    def of(rows: Bool[Array, "G T"] | None, way) -> Read:
        some = pages if rows is None else pages & rows[:, None]

        def run() -> Read:
            output, residual = way(part, some[None, None], page)
            return output[0, 0], residual[0, 0]

        if rows is None:
            return run()
        nothing = jnp.zeros((G, T, part.value.shape[-1])), jnp.full((G, T), -jnp.inf)
        return lax.cond(rows.any(), run, lambda: jax.tree.map(lambda x: x.astype(part.query.dtype), nothing))

    if fits is None:
        return of(None, reading.read)
    rows, halved = fits.rows, lambda part, *given: reading.read_halved(part, fits.keys, *given)
    in_16, in_32 = of(rows, halved), of(~rows, reading.read)
    return jnp.where(rows[..., None], in_16[0], in_32[0]), jnp.where(rows, in_16[1], in_32[1])


def merged(*parts: Read) -> Read:
    """What rows make of all the keys of which the parts have some."""
    level = jnp.stack([residual for _, residual in parts]).max(0)
    top = jnp.where(jnp.isneginf(level), 0, level)
    weights = [jnp.exp(residual - top) for _, residual in parts]
    total = sum(weights)
    output = sum(weight[..., None] * output for weight, (output, _) in zip(weights, parts, strict=True))
    return output / jnp.where(total > 0, total, 1)[..., None], jnp.log(total) + top


def pairs(pages: Bool[Array, "P G T"], page: int) -> Float[Array, ""]:
    """How many pairs of a row and a key the kernel looks at: whole pages, for all rows of a panel or for none."""
    P, G, T = pages.shape
    panels = jnp.pad(pages, ((0, 0), (0, 0), (0, -T % ROWS))).reshape(P, G, -1, ROWS).any(-1)
    return panels.sum(dtype=jnp.float32) * (ROWS * page)
