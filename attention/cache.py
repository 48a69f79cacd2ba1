"""Decoding for every method that keeps the keys and values themselves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from attention.checks import traced_check
from attention.inputs import emptied, prepare_tokens, ungrouped
from attention.masks import Mask
from attention.method import Method, compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValueCache:
    """Room for the keys and values of a sequence, of which the first `length` are filled."""

    key: Float[Array, "B K L H"]
    value: Float[Array, "B K L E"]
    length: Int[Array, ""]

    @property
    def max_length(self) -> int:
        return self.key.shape[2]

    def append(self, key: Float[Array, "B K S H"], value: Float[Array, "B K S E"]) -> "KeyValueCache":
        """The cache with S more tokens.

        Raises:
            ValueError: the cache is full. Where the length is traced, `checkify` reports it; without it the
                new values are NaN, so that an overrun cannot pass for an answer.
        """
        end = self.length + key.shape[2]
        fits = end <= self.max_length
        if not isinstance(end, Tracer) and not fits:
            raise ValueError(
                f"the cache holds {self.length} tokens of max_length {self.max_length}: "
                f"{key.shape[2]} more do not fit; pass a larger max_length to init_state"
            )
        traced_check(fits, "the cache is full: {end} tokens", end=end)
        value = jnp.where(fits, value, jnp.nan)
        return KeyValueCache(
            key=lax.dynamic_update_slice_in_dim(self.key, key.astype(self.key.dtype), self.length, axis=2),
            value=lax.dynamic_update_slice_in_dim(self.value, value.astype(self.value.dtype), self.length, axis=2),
            length=end,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cached(Method, register=False):
    """A method whose decoding state is the cache, and whose `extend` is `attend` over it."""

    def init_state(self, batch: int, num_kv_heads: int, head_dim: int, max_length: int, dtype: Any) -> KeyValueCache:
        room = jnp.zeros((batch, num_kv_heads, max_length, head_dim), dtype)
        return KeyValueCache(key=room, value=room, length=jnp.zeros((), jnp.int32))

    def extend(
        self,
        state: KeyValueCache,
        query: Array,
        key: Array,
        value: Array,
        *,
        scale: Any = None,
        temperature: Any = 1.0,
        logits_soft_cap: Any = None,
        local_window_size: Any = None,
        params: Any = None,
        rng: Any = None,
    ) -> tuple[KeyValueCache, Array]:
        new = prepare_tokens(
            self,
            query,
            key,
            value,
            scale=scale,
            temperature=temperature,
            logits_soft_cap=logits_soft_cap,
            local_window_size=local_window_size,
            params=params,
            rng=rng,
        )
        longer = state.append(new.key, new.value)
        mask = Mask(
            num_queries=new.mask.num_queries,
            num_keys=longer.max_length,
            causal=True,
            window=new.mask.window,
            offset=state.length[None],
            key_lengths=longer.length[None],
        )
        whole = emptied(dataclasses.replace(new, key=longer.key, value=longer.value, mask=mask))
        return longer, ungrouped(compiled(whole, method=self, hook="attend"), query).astype(query.dtype)
