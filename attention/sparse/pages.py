"""Pages of keys: their summaries, a sound bound on their logits, and a decoding state that keeps both.

A page is C keys that follow one another, summarised by the box around them: its least and largest entries.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention.cache import room_for
from attention.rounding import norms, product, product_roundoff, roundoff


class Pages(NamedTuple):
    """The keys and values of one or more heads in pages of C, with the box around the keys of each page.

    Attributes:
        key, value: `... P C H` and `... P C E`.
        low, high: `... P H`, the least and the largest entry of the keys of a page; 0 where it holds none.
    """

    key: Float[Array, "*N P C H"]
    value: Float[Array, "*N P C E"]
    low: Float[Array, "*N P H"]
    high: Float[Array, "*N P H"]


def paged(key: Float[Array, "B K S H"], value: Float[Array, "B K S E"], C: int, lengths) -> Pages:
    """Keys and values in pages; `lengths` (`b` or None) says how many of them exist. Copies only to fill a page."""
    S = key.shape[2]
    P = -(-S // C)
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, P * C - S), (0, 0))) for x in (key, value))
    key, value = (x.reshape(*x.shape[:2], P, C, x.shape[3]) for x in (key, value))
    end = jnp.full((1,), S) if lengths is None else lengths
    exists = jnp.arange(P * C).reshape(1, 1, P, C, 1) < end.reshape(-1, 1, 1, 1, 1)
    return Pages(key, value, *boxes(key, exists))


def boxes(key: Float[Array, "*N C H"], exists) -> tuple[Float[Array, "*N H"], Float[Array, "*N H"]]:
    """The least and the largest entries of the keys that exist in each page; zeros where none does."""
    key = lax.stop_gradient(key)
    low = jnp.where(exists, key, jnp.inf).min(-2)
    high = jnp.where(exists, key, -jnp.inf).max(-2)
    some = exists.any(-2)
    return jnp.where(some, low, 0).astype(key.dtype), jnp.where(some, high, 0).astype(key.dtype)


def box_bound(query: Float[Array, "G R H"], pages: Pages, soft_cap=None) -> Float[Array, "G R P"]:
    r"""An upper bound on every logit of each page, up to rounding: sum_h max(q_h low_h, q_h high_h).

    In two products: q . (low + high) / 2 + |q| . (high - low) / 2.

    References:
        Tang et al., "Quest: query-aware sparsity for efficient long-context LLM inference", arXiv 2406.10774,
        section 3.2.
    """
    low, high = (lax.stop_gradient(x).astype(query.dtype) for x in (pages.low, pages.high))
    query = lax.stop_gradient(query)
    both = jnp.concatenate([query, jnp.abs(query)], axis=-1)
    boxed = jnp.concatenate([(low + high) / 2, (high - low) / 2], axis=-1)
    bound = product("GRX,PX->GRP", both, boxed)
    return bound if soft_cap is None else soft_cap * jnp.tanh(bound / soft_cap)


def sound_box_bound(query: Float[Array, "G R H"], pages: Pages, soft_cap=None) -> Float[Array, "G R P"]:
    """`box_bound` rounded outward: above every exact logit of the page. `docs/bounds.md` derives the margin."""
    dtype, H = query.dtype, query.shape[-1]
    low, high = (lax.stop_gradient(x).astype(dtype) for x in (pages.low, pages.high))
    largest = norms(jnp.maximum(jnp.abs(low), jnp.abs(high)))
    size = norms(lax.stop_gradient(query))[..., None] * largest[None, None]
    margin = 1.01 * (2 * H * product_roundoff(dtype) + 16 * roundoff(dtype)) * size
    underflow = 4 * H * float(jnp.finfo(dtype).tiny) * (1 + norms(lax.stop_gradient(query)))[..., None]
    bound = box_bound(query, pages) + margin + underflow
    if soft_cap is None:
        return bound
    return soft_cap * jnp.tanh(bound / soft_cap) + 16 * roundoff(dtype) * jnp.minimum(jnp.abs(bound), soft_cap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache:
    """A decoding state: room for tokens in pages, heads first, with the box around the keys of each page.

    Attributes:
        key, value: `B K P C H` and `B K P C E`; what lies beyond `length` may be anything.
        low, high: `B K P H`, as in `Pages`.
        leader: `B K G H`, the first query of the tile at hand, where it has been seen; G = 0 before the first token.
        length: how many tokens there are.
    """

    key: Float[Array, "B K P C H"]
    value: Float[Array, "B K P C E"]
    low: Float[Array, "B K P H"]
    high: Float[Array, "B K P H"]
    leader: Float[Array, "B K G H"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, batch: int, num_kv_heads: int, head_dim: int, max_length: int, C: int, dtype: Any) -> "PagedCache":
        """Room for at least `max_length` tokens, rounded up to whole pages."""
        P = -(-max_length // C)
        room, box = (jnp.zeros((batch, num_kv_heads, P, *rest, head_dim), dtype) for rest in ((C,), ()))
        leader = jnp.zeros((batch, num_kv_heads, 0, head_dim), jnp.promote_types(dtype, jnp.float32))
        return cls(key=room, value=room, low=box, high=box, leader=leader, length=jnp.zeros((), jnp.int32))

    @property
    def pages(self) -> Pages:
        return Pages(self.key, self.value, self.low, self.high)

    def append(self, key: Float[Array, "B K T H"], value: Float[Array, "B K T E"]) -> "PagedCache":
        """The state with T more tokens, and the boxes of the pages that they came into.

        Raises:
            ValueError: the cache is full; as `attention.cache.KeyValueCache.append`.
        """
        T, (P, C) = key.shape[2], self.key.shape[2:4]
        end, value = room_for(self.length, P * C, value, axis=2)
        touched = min(P, (T + C - 2) // C + 1)
        first = jnp.minimum(self.length // C, P - touched)

        def write(_, room):
            return tuple(
                lax.dynamic_update_slice_in_dim(
                    old.reshape(*old.shape[:2], P * C, -1), new.astype(old.dtype), self.length, axis=2
                ).reshape(old.shape)
                for old, new in zip(room, (key, value), strict=True)
            )

        # A loop of one step, which XLA does not know, and nothing in it that reads what it wrote: see
        # `attention.cache.KeyValueCache.append`.
        keys, values = lax.fori_loop(0, jnp.minimum(end, 1), write, (self.key, self.value))
        those = lax.dynamic_slice_in_dim(keys, first, touched, axis=2)
        exists = (first * C + jnp.arange(touched * C)).reshape(1, 1, touched, C, 1) < end
        low, high = (
            lax.dynamic_update_slice_in_dim(old, new, first, axis=2)
            for old, new in zip((self.low, self.high), boxes(those, exists), strict=True)
        )
        return dataclasses.replace(self, key=keys, value=values, low=low, high=high, length=end)
