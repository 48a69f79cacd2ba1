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
        box: `... P 2H`, its centre and half its widths, at least in float32; 0 where a page holds no key.
    """

    key: Float[Array, "*N P C H"]
    value: Float[Array, "*N P C E"]
    box: Float[Array, "*N P X"]


def paged(key: Float[Array, "B K S H"], value: Float[Array, "B K S E"], C: int, lengths) -> Pages:
    """Keys and values in pages; `lengths` (`b` or None) says how many of them exist. Copies only to fill a page."""
    S = key.shape[2]
    P = -(-S // C)
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, P * C - S), (0, 0))) for x in (key, value))
    key, value = (x.reshape(*x.shape[:2], P, C, x.shape[3]) for x in (key, value))
    end = jnp.full((1,), S) if lengths is None else lengths
    exists = jnp.arange(P * C).reshape(1, 1, P, C, 1) < end.reshape(-1, 1, 1, 1, 1)
    return Pages(key, value, boxes(key, exists))


def boxes(key: Float[Array, "*N C H"], exists) -> Float[Array, "*N X"]:
    """The boxes around the keys that exist in each page: centres and half the widths; zeros where none does."""
    key = lax.stop_gradient(key)
    low = jnp.where(exists, key, jnp.inf).min(-2)
    high = jnp.where(exists, key, -jnp.inf).max(-2)
    dtype = jnp.promote_types(key.dtype, jnp.float32)
    low, high = (jnp.where(exists.any(-2), x, 0).astype(dtype) for x in (low, high))
    return jnp.concatenate([(low + high) / 2, (high - low) / 2], axis=-1)


def box_bound(query: Float[Array, "G R H"], box: Float[Array, "P X"], soft_cap=None) -> Float[Array, "G R P"]:
    r"""An upper bound on every logit of each page, up to rounding: sum_h max(q_h low_h, q_h high_h).

    In two products: q . (low + high) / 2 + |q| . (high - low) / 2.

    References:
        Tang et al., "Quest: query-aware sparsity for efficient long-context LLM inference", arXiv 2406.10774,
        section 3.2.
    """
    upright = jnp.moveaxis(lax.stop_gradient(query), 2, 0)  # the boxes are read as they lie
    both = jnp.concatenate([upright, jnp.abs(upright)])
    bound = jnp.moveaxis(product("PX,XGR->PGR", box.astype(query.dtype), both), 0, 2)
    return bound if soft_cap is None else soft_cap * jnp.tanh(bound / soft_cap)


def sound_box_bound(query: Float[Array, "G R H"], box: Float[Array, "P X"], soft_cap=None) -> Float[Array, "G R P"]:
    """`box_bound` rounded outward: above every exact logit of the page. `docs/bounds.md` derives the margin."""
    dtype, H = query.dtype, query.shape[-1]
    centre, half = jnp.split(box.astype(dtype), 2, axis=-1)
    largest = norms(jnp.abs(centre) + half)
    size = norms(lax.stop_gradient(query))[..., None] * largest[None, None]
    margin = 1.01 * (2 * H * product_roundoff(dtype) + 16 * roundoff(dtype)) * size
    underflow = 4 * H * float(jnp.finfo(dtype).tiny) * (1 + norms(lax.stop_gradient(query)))[..., None]
    bound = box_bound(query, box) + margin + underflow
    if soft_cap is None:
        return bound
    return soft_cap * jnp.tanh(bound / soft_cap) + 16 * roundoff(dtype) * jnp.minimum(jnp.abs(bound), soft_cap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache:
    """A decoding state: room for tokens in pages, heads first, with the box around the keys of each page.

    Attributes:
        key, value: `B K P C H` and `B K P C E`; what lies beyond `length` may be anything.
        box: `B K P 2H`, as in `Pages`.
        chosen: `B K G n`, the pages that the tile at hand has chosen; -1 where it has chosen fewer.
        length: how many tokens there are.
    """

    key: Float[Array, "B K P C H"]
    value: Float[Array, "B K P C E"]
    box: Float[Array, "B K P X"]
    chosen: Int[Array, "B K G n"]
    length: Int[Array, ""]

    @classmethod
    def empty(
        cls, batch: int, num_kv_heads: int, groups: int, head_dim: int, max_length: int, C: int, blocks: int, dtype: Any
    ) -> "PagedCache":
        """Room for at least `max_length` tokens, rounded up to whole pages, and for the choice of `blocks` of them."""
        P = -(-max_length // C)
        key, value = (jnp.zeros((batch, num_kv_heads, P, C, head_dim), dtype) for _ in range(2))
        box = jnp.zeros((batch, num_kv_heads, P, 2 * head_dim), jnp.promote_types(dtype, jnp.float32))
        chosen = jnp.full((batch, num_kv_heads, groups, min(P, blocks)), -1, jnp.int32)
        return cls(key=key, value=value, box=box, chosen=chosen, length=jnp.zeros((), jnp.int32))

    @property
    def pages(self) -> Pages:
        return Pages(self.key, self.value, self.box)

    @property
    def max_length(self) -> int:
        return self.key.shape[2] * self.key.shape[3]

    def append(self, key: Float[Array, "B K T H"], value: Float[Array, "B K T E"]) -> "PagedCache":
        """The state with T more tokens, and the boxes of the pages that they came into.

        Raises:
            ValueError: the cache is full; as `attention.cache.KeyValueCache.append`.
        """
        T, (P, C) = key.shape[2], self.key.shape[2:4]
        keys, values, end = written(self.key, self.value, self.length, key, value)
        first, touched = touched_pages(self.length, T, P, C)
        those = lax.dynamic_slice_in_dim(keys, first, touched, axis=2)
        exists = (first * C + jnp.arange(touched * C)).reshape(1, 1, touched, C, 1) < end
        box = lax.dynamic_update_slice_in_dim(self.box, boxes(those, exists), first, axis=2)
        return dataclasses.replace(self, key=keys, value=values, box=box, length=end)


def touched_pages(length, T: int, P: int, C: int) -> tuple[Int[Array, ""], int]:
    """The first of so many pages among which are all that T more tokens come into."""
    touched = min(P, (T + C - 2) // C + 1)
    return jnp.minimum(length // C, P - touched), touched


def written(
    keys: Float[Array, "B K P C H"], values: Float[Array, "B K P C E"], length, key, value
) -> tuple[Array, Array, Int[Array, ""]]:
    """Pages with T more tokens, `B K T ...`, from `length` on, and the new length.

    Raises:
        As `attention.cache.KeyValueCache.append`.
    """
    P, C = keys.shape[2:4]
    end, value = room_for(length, P * C, value, axis=2)

    def write(_, room):
        return tuple(
            lax.dynamic_update_slice_in_dim(
                old.reshape(*old.shape[:2], P * C, -1), new.astype(old.dtype), length, axis=2
            ).reshape(old.shape)
            for old, new in zip(room, (key, value), strict=True)
        )

    # A loop of one step, which XLA does not know, and nothing in it that reads what it wrote: see
    # `attention.cache.KeyValueCache.append`.
    return *lax.fori_loop(0, jnp.minimum(end, 1), write, (keys, values)), end
