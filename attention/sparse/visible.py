"""What the queries of a tile see of pages of keys."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.masks import Mask
from attention.rounding import product


class Visible(NamedTuple):
    """Of pages of so many keys, what some queries see.

    Attributes:
        whole: whether a query sees all keys of a page.
        known: whether it sees the first.
        seen: whether it may see any.
        last: the last key that it may see.
    """

    whole: Bool[Array, "P 1 T"]
    known: Bool[Array, "P 1 T"]
    seen: Bool[Array, "P 1 T"]
    last: Int[Array, " T"]


def regular(inputs: Inputs) -> bool:
    """Whether every logit is q.k, and the mask has no table: then a mean key says what a page of them can be."""
    return inputs.mask.dense is None and inputs.bias is None and inputs.soft_cap is None


def alike(inputs: Inputs) -> bool:
    """Whether every query of a head that sees any keys sees the same, and all that counts of these is their logits."""
    mask = inputs.mask
    unbanded = not mask.causal and mask.window is None
    return regular(inputs) and unbanded and mask.query_segments is None and mask.key_segments is None


def first_keys(inputs: Inputs) -> Int[Array, ""]:
    """How many keys, from the first on, the queries of the first batch element see, where these are `alike`."""
    lengths = inputs.mask.key_lengths
    return jnp.asarray(inputs.mask.num_keys) if lengths is None else lengths[0]


def first_rows(inputs: Inputs) -> Int[Array, ""]:
    """How many queries of the first batch element there are."""
    lengths = inputs.mask.query_lengths
    return jnp.asarray(inputs.mask.num_queries) if lengths is None else lengths[0]


def spaced(count, some: int) -> Int[Array, " some"]:
    """Indices below `count`, evenly spaced, without products that overflow; zeros if there are none."""
    count, i = jnp.maximum(count, 0), jnp.arange(some)
    return i * (count // some) + i * (count % some) // some


def visible_pages(mask: Mask, at: Int[Array, " T"], pages: int, page: int) -> Visible:
    """What the queries `at` of the first batch element see of the first pages; by a table less than that."""
    first, last = (x[0][at] for x in mask.key_range())
    start = page * jnp.arange(pages)[:, None]
    low, high = first[None], last[None]
    known = (low <= start) & (high >= start)
    whole, seen = known & (high >= start + page - 1), (low <= start + page - 1) & (high >= start)
    if mask.query_segments is not None and mask.key_segments is not None:
        mine, theirs = mask.query_segments[0][at][None], mask.key_segments[0][: pages * page].reshape(pages, page)
        least, most = theirs.min(1)[:, None], theirs.max(1)[:, None]
        same = (least == mine) & (most == mine)
        whole, known, seen = whole & same, known & same, seen & (least <= mine) & (mine <= most)
    if mask.dense is not None:
        whole = jnp.zeros_like(whole)
    return Visible(whole[:, None], known[:, None], seen[:, None], last)


class Edge(NamedTuple):
    """Of the page that a query sees in part: the mean of its first keys, up to the last that is seen, and their number.

    The number is 0 where there is no such page, or its first key is not seen.
    """

    mean: Float[Array, "T H"]
    count: Float[Array, " T"]


def edges(visible: Visible, growing: Float[Array, "S H"], page: int) -> Edge:
    """From the mean of each key and of those before it in its page."""
    cut = (visible.known & ~visible.whole).any((0, 1))
    count = jnp.where(cut, visible.last % page + 1, 0).astype(growing.dtype)
    return Edge(growing[visible.last.clip(0, len(growing) - 1)], count)


def growing_means(key: Float[Array, "S H"], page: int) -> Float[Array, "S H"]:
    """The mean of each key and of those before it in its page, by a triangular product."""
    weights = jnp.tri(page, dtype=key.dtype) / jnp.arange(1, page + 1, dtype=key.dtype)[:, None]
    pages = key.reshape(-1, page, key.shape[-1])
    return product("ij,pjh->pih", weights, pages).reshape(key.shape)
