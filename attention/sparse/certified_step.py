"""A step of decoding within a tolerance: the plan of one query from the moments in the state, and only what it reads.

The plan is that of `attention.sparse.plan`; what is read are single pages, copied a few at a time to where the caches
keep them, and as many as some query head of a key head wants.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.exact import softmax
from attention.exponential import finite
from attention.logits import soft_capped
from attention.masks import Mask
from attention.native import build, reading
from attention.rounding import CALM, Sizes, norms, product
from attention.sparse import kernel
from attention.sparse.bounds import REACH
from attention.sparse.gathered import attend
from attention.sparse.kernel import Read
from attention.sparse.moments import outward
from attention.sparse.plan import Limits, Plan, limits_of, plan
from attention.sparse.selection import keys_of
from attention.sparse.step import gathered
from attention.sparse.summaries import SummarisedCache
from attention.sparse.visible import Visible

AT_ONCE = 2048  # keys that are copied and read at a time


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
    (B, K, G, H), C = query.shape, state.key.shape[3]
    dtype = jnp.promote_types(query.dtype, state.longest[0].dtype)
    pages = jax.tree.map(lambda x: x.astype(dtype).reshape(B * K, *x.shape[2:]), state.pages)
    own = jax.tree.map(lambda x: x.reshape(B * K, G, 1), _limits(query.astype(dtype), state, mask, cap))
    heads = query.astype(dtype).reshape(B * K, G, 1, H)

    def planned(n) -> Plan:
        mine, moments, limits = jax.tree.map(lambda x: x[n], (heads, pages, own))
        visible, known = _visible(mine, state, n, mask, regular=cap is None)
        return plan(mine, moments, visible, known, limits, size=C, tolerance=tolerance, reach=REACH[bound])

    chosen = lax.stop_gradient(lax.map(planned, jnp.arange(B * K)))
    operands = {"query": query.astype(dtype), "key": state.key, "value": state.value}
    operands |= {"keys": pages.key, "values": pages.value} | ({} if cap is None else {"cap": cap})
    arrays, form = jax.tree.flatten((chosen.read[..., 0], chosen.mean[..., 0], mask, state.length))
    return _attended(operands, arrays, form).reshape(B, K, G, -1)


# As in `attention.sparse.certified`, the mask travels as bare arrays.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _attended(operands, arrays, form) -> Float[Array, "n G E"]:
    """Over the keys of pages that are read, and the means of others, of key head after key head."""
    read, mean, mask, length = jax.tree.unflatten(form, arrays)
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    (B, K, G, H), P = query.shape, key.shape[2]
    heads = query.reshape(B * K, G, H)

    def means(n) -> Read:
        logits = jnp.where(mean[n].T, product("GH,PH->GP", heads[n], operands["keys"][n]), -jnp.inf)
        top = finite(logits.max(1))
        weights = jnp.exp(logits - top[:, None])
        total = weights.sum(1)
        output = product("GP,PE->GE", weights, operands["values"][n]) / jnp.where(total > 0, total, 1)[:, None]
        return output, jnp.log(key.shape[3] * total) + top

    if kernel.able_step(query, key):
        slots = jax.vmap(lambda row: jnp.nonzero(row, size=P, fill_value=-1)[0])(read.swapaxes(1, 2).reshape(-1, P))
        found = reading.read_pages(query, key, value, slots.reshape(B, K, G, P), mask, operands.get("cap"))
        output, residual = (x.reshape(B * K, G, *x.shape[3:]) for x in found)
    else:
        some = functools.partial(_copied, operands, mask, length)
        output, residual = lax.map(lambda n: some(heads[n], read[n], n), jnp.arange(B * K))
    return kernel.merged(lax.map(means, jnp.arange(B * K)), (output, residual))[0]


@_attended.defjvp
def _attended_jvp(form, primals, tangents):
    """By the definition: softmax over the means of some pages, each as often as it has keys, and over other keys."""
    operands, arrays = primals
    read, mean, mask, _ = jax.tree.unflatten(form, arrays)

    def defined(operands):
        C, dtype = operands["key"].shape[3], operands["query"].dtype
        query, key, value = (
            operands[x].reshape(len(read), -1, operands[x].shape[-1]) for x in ("query", "key", "value")
        )
        own = jnp.repeat(read, C, axis=1).swapaxes(1, 2)
        seen = mask.at(jnp.zeros(1, jnp.int32), jnp.arange(key.shape[1]))[0, 0] & own
        means = product("nGH,nPH->nGP", query, operands["keys"]) + jnp.log(C)
        keys = soft_capped(product("nGH,nSH->nGS", query, key.astype(dtype)), operands.get("cap"))
        logits = [jnp.where(x, y, -jnp.inf) for x, y in ((mean.swapaxes(1, 2), means), (seen, keys))]
        values = jnp.where(seen.any(1)[..., None], value, 0).astype(dtype)  # beyond the end there may be anything
        values = jnp.concatenate([operands["values"], values], axis=1)
        return product("nGS,nSE->nGE", softmax(jnp.concatenate(logits, axis=2)), values)

    return _attended(operands, arrays, form), jax.jvp(defined, (operands,), (tangents[0],))[1]


def _copied(operands, mask: Mask, length, query: Float[Array, "G H"], read: Bool[Array, "P G"], n) -> Read:
    """The keys of pages that are read of one key head, copied a few at a time."""
    key, value, cap = (operands.get(name) for name in ("key", "value", "cap"))
    P, C = key.shape[2:4]
    some = max(1, min(P, AT_ONCE // C))
    order = jnp.nonzero(read.any(1), size=P + some, fill_value=P)[0]

    def add(i, found: Read) -> Read:
        at = lax.dynamic_slice_in_dim(order, i * some, some)
        keys, values = (gathered(x, n, at, length) for x in (key, value))
        shown = jnp.repeat(jnp.take(read, at, axis=0, mode="fill", fill_value=False), C, axis=0).T[:, None]
        visible = mask.at(jnp.zeros(1, jnp.int32), keys_of(at, C))[0, 0] & shown
        more = attend(query[:, None], keys, values, visible, cap, None)
        return kernel.merged(found, (more.output[:, 0], (jnp.log(more.total) + more.level)[:, 0]))

    nothing = jnp.zeros((len(query), value.shape[-1]), query.dtype), jnp.full(len(query), -jnp.inf, query.dtype)
    return lax.fori_loop(0, -(-read.any(1).sum() // some), add, nothing)


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
    steps = max(2 * parts, kernel.rescalings(P * C, C) + build.PARTS if kernel.able_step(query, state.key) else 0)
    depth = max(P, C, AT_ONCE) + parts
    return limits_of(of, reach, C, rescalings=steps, fixed_shift=CALM, depth=depth)


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
