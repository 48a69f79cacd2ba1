"""What the queries of a tile see of pages of keys."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from attention.inputs import Inputs
from attention.masks import Mask, slice_or_keep


class Visible(NamedTuple):
    """Of pages of so many keys, what some queries see.

    Attributes:
        whole: whether a query sees all keys of a page.
        seen: whether it may see any.
    """

    whole: Bool[Array, "P 1 T"]
    seen: Bool[Array, "P 1 T"]


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
    whole, seen = (low <= start) & (high >= start + page - 1), (low <= start + page - 1) & (high >= start)
    if mask.query_segments is not None and mask.key_segments is not None:
        mine, theirs = mask.query_segments[0][at][None], mask.key_segments[0][: pages * page].reshape(pages, page)
        least, most = theirs.min(1)[:, None], theirs.max(1)[:, None]
        same = (least == mine) & (most == mine)
        whole, seen = whole & same, seen & (least <= mine) & (mine <= most)
    if mask.dense is not None:
        whole = jnp.zeros_like(whole)
    return Visible(whole[:, None], seen[:, None])


def mask_of_heads(mask: Mask, b, k, g, count: int) -> Mask:
    """The mask of some query heads, from g on of key head k of one batch element."""

    def pick(x, index, axis=0, size=1):
        return None if x is None else slice_or_keep(x, index, size, axis)

    return dataclasses.replace(
        mask,
        offset=pick(mask.offset, b),
        query_lengths=pick(mask.query_lengths, b),
        key_lengths=pick(mask.key_lengths, b),
        query_segments=pick(mask.query_segments, b),
        key_segments=pick(mask.key_segments, b),
        dense=pick(pick(pick(mask.dense, b, 0), k, 1), g, 2, count),
    )
