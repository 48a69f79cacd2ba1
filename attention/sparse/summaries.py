"""A decoding state that keeps the moments of its whole pages, and how long its keys and values are at most."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention.rounding import norms
from attention.sparse.moments import Moments, moments
from attention.sparse.pages import touched_pages, written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SummarisedCache:
    """Room for tokens in pages, heads first, with the moments of those that are full.

    Attributes:
        key, value: `B K P C H` and `B K P C E`; what lies beyond `length` may be anything.
        pages: the moments, `B K P ...`, at least in float32; zeros where a page is not full.
        origin: `B K E`, the first value.
        longest: `B K`, the largest norms among the keys, the values, and the values less the first of them.
        length: how many tokens there are.
    """

    key: Float[Array, "B K P C H"]
    value: Float[Array, "B K P C E"]
    pages: Moments
    origin: Float[Array, "B K E"]
    longest: tuple[Float[Array, "B K"], ...]
    length: Int[Array, ""]

    @classmethod
    def empty(
        cls, batch: int, num_kv_heads: int, head_dim: int, max_length: int, C: int, bound: str, dtype: Any
    ) -> "SummarisedCache":
        """Room for at least `max_length` tokens, rounded up to whole pages, for the moments that `bound` needs."""
        P = -(-max_length // C)
        key, value = (jnp.zeros((batch, num_kv_heads, P, C, head_dim), dtype) for _ in range(2))
        wide = jax.ShapeDtypeStruct((batch, num_kv_heads, P * C, head_dim), jnp.promote_types(dtype, jnp.float32))
        shapes = jax.eval_shape(lambda x: moments(x, x, C, bound=bound), wide)
        return cls(
            key=key,
            value=value,
            pages=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            origin=jnp.zeros((batch, num_kv_heads, head_dim), wide.dtype),
            longest=tuple(jnp.zeros((batch, num_kv_heads), wide.dtype) for _ in range(3)),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def max_length(self) -> int:
        return self.key.shape[2] * self.key.shape[3]

    def append(self, key: Float[Array, "B K T H"], value: Float[Array, "B K T E"], bound: str) -> "SummarisedCache":
        """The state with T more tokens, and the moments of the pages that they fill.

        Cost: the moments of the pages that they come into, where they fill one.

        Raises:
            ValueError: the cache is full; as `attention.cache.KeyValueCache.append`.
        """
        T, (P, C), wide = key.shape[2], self.key.shape[2:4], self.longest[0].dtype
        origin, longest = self._longest(key, value)
        keys, values, end = written(self.key, self.value, self.length, key, value)
        first, touched = touched_pages(self.length, T, P, C)
        those = [lax.dynamic_slice_in_dim(x, first, touched, axis=2) for x in (keys, values)]
        full = ((first + jnp.arange(touched) + 1) * C <= end)[:, None, None]
        those = [jnp.where(full, x, jnp.zeros_like(x)).astype(wide) for x in those]

        heads = tuple(x.reshape(-1, touched * C, x.shape[-1]) for x in those)
        filled = jnp.minimum(end // C - self.length // C, 1)

        def found():  # one head's products at a time
            new = lax.map(lambda x: moments(*x, C, bound=bound), heads)
            return jax.tree.map(lambda x: x.reshape(*self.key.shape[:2], *x.shape[1:]), new)

        # Decided outside of the loop, out of which XLA would move the moments to make them in every step.
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(found))
        new = lax.cond(filled > 0, found, lambda: empty)

        def update(_, pages):
            return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, first, axis=2), pages, new)

        # A loop of one step or none, which updates in place: see `written`.
        pages = lax.fori_loop(0, filled, update, self.pages)
        return SummarisedCache(key=keys, value=values, pages=pages, origin=origin, longest=longest, length=end)

    def _longest(self, key, value):
        """`origin` and `longest` with the tokens to come, as they will be kept."""
        key, value = (x.astype(self.key.dtype).astype(self.origin.dtype) for x in (key, value))
        origin = jnp.where(self.length > 0, self.origin, value[:, :, 0])
        new = (norms(x).max(-1) for x in (key, value, value - origin[:, :, None]))
        return origin, tuple(jnp.maximum(a, b) for a, b in zip(self.longest, new, strict=True))
