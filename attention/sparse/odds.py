"""Certificates from the odds of what was not read, of which only an upper bound is known."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.masks import Mask
from attention.method import Certificate
from attention.rounding import CALM
from attention.sparse.bounds import sparse_certificate
from attention.sparse.gathered import Found
from attention.sparse.pages import Pages, sound_box_bound


def odds_of_the_rest(
    query: Float[Array, "G R H"],
    rows: Int[Array, " R"],
    found: Found,
    pages: Pages,
    read: Bool[Array, "r P"],
    mask: Mask,
    soft_cap: Float[Array, ""] | None,
) -> Float[Array, "G R"]:
    """An upper bound on sum(exp(logit)) over the visible keys that were not read, against that over those that were.

    Every page of which a row sees a key and that it has not `read` as a whole counts in full.
    """
    P, C = pages.key.shape[:2]
    first, last = (x[0][rows.clip(0, mask.num_queries - 1)][:, None] for x in mask.key_range())
    starts = jnp.arange(P)[None] * C
    dropped = (starts <= last) & (starts + C > first) & (first <= last) & ~read
    return odds_of_pages(query, found, pages.box, C, dropped, soft_cap)


def odds_of_pages(
    query: Float[Array, "G R H"],
    found: Found,
    box: Float[Array, "P X"],
    C: int,
    dropped: Bool[Array, "r P"],
    soft_cap: Float[Array, ""] | None,
) -> Float[Array, "G R"]:
    """The same for the pages of C keys that each row dropped, each of which counts in full."""
    tiny = float(jnp.finfo(query.dtype).tiny)
    terms = jnp.exp(sound_box_bound(query, box, soft_cap) - found.level[..., None])
    return _odds(C * jnp.where(dropped[None], jnp.maximum(terms, tiny), 0).sum(-1), found.total)


def _odds(lost: Float[Array, "*N"], total: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Lost mass against the mass that was read; infinite only where nothing was read and something may be lost."""
    most = float(jnp.finfo(total.dtype).max)
    against = jnp.fmin(lost / jnp.where(total > 0, total, 1), most)  # of NaN and an overflow, the largest number
    return jnp.where(lost == 0, 0, jnp.where(total > 0, against, jnp.inf))


def odds_certificate(
    inputs: Inputs, against: Float[Array, "B K G T"], work: Float[Array, ""], *, rescalings: int = 0
) -> Certificate:
    """The bound tau diam(V), and rounding: the odds a : 1 of what was not read give tau <= a / (1 + a).

    A row that read nothing of what it sees has output 0, whose error no diameter bounds: infinite.
    """
    share = jnp.where(against < 1, against / (1 + against), 1 / (1 + 1 / against))
    known = sparse_certificate(inputs, share, work=work, fixed_shift=CALM, rescalings=rescalings)
    return dataclasses.replace(known, error_bound=jnp.where(jnp.isinf(against), jnp.inf, known.error_bound))
