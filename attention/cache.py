"""Decoding for every method that keeps the keys and values themselves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from attention.checks import traced_check
from attention.inputs import Inputs, emptied, prepare_tokens, ungrouped
from attention.masks import Mask
from attention.method import Method, compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValueCache:
    """Room for the keys and values of a sequence, of which the first `length` are filled; laid out as callers do."""

    key: Float[Array, "B L K H"]
    value: Float[Array, "B L K E"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, batch: int, num_kv_heads: int, head_dim: int, max_length: int, dtype: Any) -> "KeyValueCache":
        """Room for `max_length` tokens, of which none is there."""
        # Two arrays, since one buffer cannot be donated twice.
        key, value = (jnp.zeros((batch, max_length, num_kv_heads, head_dim), dtype) for _ in range(2))
        return cls(key=key, value=value, length=jnp.zeros((), jnp.int32))

    @property
    def max_length(self) -> int:
        return self.key.shape[1]

    def append(self, key: Float[Array, "B S K H"], value: Float[Array, "B S K E"]) -> "KeyValueCache":
        """The cache with S more tokens.

        Raises:
            ValueError: the cache is full. Where the length is traced, `checkify` reports it; without it the
                new values are NaN, so that an overrun cannot pass for an answer.
        """
        end, value = room_for(self.length, self.max_length, value, axis=1)

        def write(_, room):
            return tuple(
                lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.length, axis=1)
                for old, new in zip(room, (key, value), strict=True)
            )

        # A loop of one step, which XLA does not know: it updates in place, where the bare update would be fused into
        # every reader of the cache, with a copy for each.
        key, value = lax.fori_loop(0, jnp.minimum(end, 1), write, (self.key, self.value))
        return KeyValueCache(key=key, value=value, length=end)


def room_for(length, max_length: int, value: Float[Array, "..."], *, axis: int) -> tuple[Int[Array, ""], Array]:
    """The length with the new tokens, which lie along an axis of `value`, and their values: NaN where they do not fit.

    Raises:
        As `KeyValueCache.append`.
    """
    end = length + value.shape[axis]
    fits = end <= max_length
    if not isinstance(end, Tracer) and not fits:
        raise ValueError(
            f"the cache holds {length} tokens of max_length {max_length}: "
            f"{value.shape[axis]} more do not fit; pass a larger max_length to init_state"
        )
    traced_check(fits, "the cache is full: {end} tokens", end=end)
    return end, jnp.where(fits, value, jnp.nan)


def mask_of_tokens(new: Mask, start, end, max_length: int) -> Mask:
    """What new tokens, those from `start` to `end` of a sequence, see in a state with room for `max_length`."""
    return Mask(
        num_queries=new.num_queries,
        num_keys=max_length,
        causal=True,
        window=new.window,
        offset=start[None],
        key_lengths=end[None],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cached(Method, register=False):
    """A method whose decoding state is the cache, and whose `extend` is `attend` over it."""

    def init_state(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: Any,
        *,
        num_heads: int | None = None,
    ) -> KeyValueCache:
        del num_heads
        return KeyValueCache.empty(batch, num_kv_heads, head_dim, max_length, dtype)

    def extend(
        self, state: KeyValueCache, query: Array, key: Array, value: Array, **options: Any
    ) -> tuple[KeyValueCache, Array]:
        new = prepare_tokens(self, query, key, value, **options)
        longer = state.append(*(jnp.swapaxes(x, 1, 2) for x in (new.key, new.value)))
        mask = mask_of_tokens(new.mask, state.length, longer.length, longer.max_length)
        key, value = (jnp.swapaxes(x, 1, 2) for x in (longer.key, longer.value))
        whole = dataclasses.replace(new, key=key, value=value, mask=mask)
        return longer, ungrouped(compiled(whole, method=self, hook="attend_cached"), query).astype(query.dtype)

    def attend_cached(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        """`attend` for inputs whose unseen slots may still hold anything."""
        return self.attend(emptied(inputs))
