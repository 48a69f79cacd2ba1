"""A step of decoding within a tolerance: the plan of one query from the moments in the state, and only what it reads.

The plan is that of `attention.sparse.plan`; what is read are single pages, copied a few at a time to where the caches
keep them, and as many as some query head of a key head wants.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.exponential import finite
from attention.masks import Mask
from attention.rounding import CALM, Sizes, norms, product
from attention.sparse.bounds import REACH
from attention.sparse.gathered import attend
from attention.sparse.moments import outward
from attention.sparse.plan import Limits, Plan, limits_of, plan
from attention.sparse.selection import keys_of
from attention.sparse.step import gathered
from attention.sparse.summaries import SummarisedCache
from attention.sparse.visible import Visible

AT_ONCE = 2048  # keys that are copied and read at a time


class Sums(NamedTuple):
    """Of each query head, relative to e^level: the sum of e^l v, that of e^l, and the level; -inf before any."""

    values: Float[Array, "G E"]
    total: Float[Array, " G"]
    level: Float[Array, " G"]


def step(
    query: Float[Array, "B K G H"],
    state: SummarisedCache,
    mask: Mask,
    cap: Float[Array, ""] | None,
    *,
    tolerance: float,
    bound: str,
) -> Float[Array, "B K G E"]:
    """The output of the query of the last token in `state`. `mask` is that of this query, causal and without tables."""
    (B, K, G, H), (P, C) = query.shape, state.key.shape[2:4]
    E, dtype = state.value.shape[-1], jnp.promote_types(query.dtype, state.longest[0].dtype)
    pages = jax.tree.map(lambda x: x.astype(dtype).reshape(B * K, *x.shape[2:]), state.pages)
    own = _limits(query.astype(dtype), state, mask, cap)
    own = jax.tree.map(lambda x: x.reshape(B * K, G, 1), own)
    heads = query.astype(dtype).reshape(B * K, G, 1, H)
    some = max(1, min(P, AT_ONCE // C))

    def head(n):
        options = {"size": C, "tolerance": tolerance, "reach": REACH[bound]}
        mine, moments, limits = jax.tree.map(lambda x: x[n], (heads, pages, own))
        visible, known = _visible(mine, state, n, mask, regular=cap is None)
        chosen = plan(*lax.stop_gradient((mine, moments, visible, known, limits)), **options)
        wanted = chosen.read[..., 0]  # P G
        order = jnp.nonzero(wanted.any(1), size=P + some, fill_value=P)[0]

        def add(i, sums: Sums) -> Sums:
            at = lax.dynamic_slice_in_dim(order, i * some, some)
            key, value = (gathered(x, n, at, state.length) for x in (state.key, state.value))
            shown = jnp.repeat(jnp.take(wanted, at, axis=0, mode="fill", fill_value=False), C, axis=0).T[:, None]
            visible = mask.at(jnp.zeros(1, jnp.int32), keys_of(at, C))[0, 0] & shown
            found = attend(mine, key, value, visible, cap, None)
            level = jnp.where(found.total > 0, found.level, -jnp.inf)[:, 0]
            return _merged(sums, Sums(found.output[:, 0] * found.total, found.total[:, 0], level))

        sums = _of_means(chosen, moments.value, C)
        steps = -(-wanted.any(1).sum() // some)
        sums = lax.fori_loop(0, steps, add, sums)
        return sums.values / jnp.where(sums.total > 0, sums.total, 1)[:, None]

    return lax.map(head, jnp.arange(B * K)).reshape(B, K, G, E)


def _limits(query, state: SummarisedCache, mask: Mask, cap) -> Limits:
    """The limits of the query: those of `attention.sparse.plan.limits`, from what is kept of all tokens."""
    (P, C), dtype, (H, E) = state.key.shape[2:4], query.dtype, (query.shape[-1], state.value.shape[-1])
    key, value, spread = (x.astype(dtype)[:, :, None, None] for x in state.longest)
    first, last = mask.key_range()
    count = (last - first + 1).clip(0).astype(dtype)[:, None, None]
    length = norms(query)[..., None]
    of = Sizes(length, key, value, count, None, cap, H, E, state.key.dtype)
    reach = 2 * outward(dtype, E) * jnp.minimum(value, spread)
    # Sums are rescaled by each part that is read, and rounded twice more by the division and the product between.
    parts = -(-P * C // min(P * C, AT_ONCE)) + 2
    depth = max(P, C, AT_ONCE) + parts
    return limits_of(of, reach, C, rescalings=2 * parts, fixed_shift=CALM, depth=depth)


def _visible(query: Float[Array, "G 1 H"], state: SummarisedCache, n, mask: Mask, *, regular: bool):
    """What the query sees of the pages of head n, as `attention.sparse.visible` says of a tile, and what is known of
    the page that it sees in part: the log of what its keys add up to is no less than that of their mean, so many times.
    """
    (P, C), dtype = state.key.shape[2:4], state.longest[0].dtype
    first, last = (x[0, 0] for x in mask.key_range())
    start = C * jnp.arange(P)[:, None, None]
    whole, seen = (first <= start) & (last >= start + C - 1), (first <= start + C - 1) & (last >= start)
    page = last // C
    cut = (first <= page * C) & (last < page * C + C - 1) & (last >= first) & regular
    keys = gathered(state.key, n, page[None], state.length).astype(dtype)
    first_keys = jnp.where((page * C + jnp.arange(C) <= last)[:, None], keys, 0).sum(0)
    count = (last % C + 1).astype(dtype)
    known = (query * (first_keys / count)[None, None]).sum(-1) + jnp.log(count)
    return Visible(whole & regular, seen), jnp.where(cut, known, -jnp.inf)


def _of_means(chosen: Plan, value: Float[Array, "P E"], C: int) -> Sums:
    """The sums over the pages that are replaced by their means."""
    mean, logits = chosen.mean[..., 0].T, chosen.logits[..., 0].T  # G P
    logits = jnp.where(mean, logits, -jnp.inf)
    level = logits.max(1)
    weights = C * jnp.exp(logits - finite(level)[:, None])
    return Sums(product("GP,PE->GE", weights, value), weights.sum(1), level)


def _merged(a: Sums, b: Sums) -> Sums:
    level = jnp.maximum(a.level, b.level)
    x, y = (jnp.exp(part.level - finite(level)) for part in (a, b))
    return Sums(a.values * x[:, None] + b.values * y[:, None], a.total * x + b.total * y, level)
