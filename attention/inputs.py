"""What a method receives: checked, scaled, grouped, and free of anything that no query sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention.checks import (
    checked_cap,
    checked_lengths,
    checked_operands,
    checked_segments,
    checked_window,
    grouped_table,
)
from attention.logits import inverse_temperature, soft_capped
from attention.masks import Mask, slice_or_keep
from attention.method import Method, UnsupportedError, capable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The operands of one attention call, heads first.

    Attributes:
        query: `B K G T H`, times beta, in float32 (float64 for float64 operands).
        beta: scale / temperature, which `query` already carries, in its dtype: `()`, or `K G` where it is one
            number a head. For methods that have to share it out between query and key.
        key: `B K S H`, in the caller's dtype.
        value: `B K S E`, in the caller's dtype.
        mask: which keys each query sees.
        bias: five axes, each full or of size 1, broadcastable to `B K G T S`, added after the cap; or None.
        soft_cap: logits become cap * tanh(logits / cap); or None.
        params: what `Method.init` returned; or None.
        rng: a key for methods that draw; or None.
    """

    query: Float[Array, "B K G T H"]
    beta: Float[Array, ""] | Float[Array, "K G"]
    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S E"]
    mask: Mask
    bias: Float[Array, "b k g t s"] | None = None
    soft_cap: Float[Array, ""] | None = None
    params: Any = None
    rng: Any = None

    def scores(self, row, rows: int, col, cols: int) -> Float[Array, "B K G rows cols"]:
        """The logits of a tile, before the mask: soft cap of beta q.k, plus bias, in the query's dtype."""
        query = lax.dynamic_slice_in_dim(self.query, row, rows, axis=3)
        key = lax.dynamic_slice_in_dim(self.key, col, cols, axis=2).astype(query.dtype)
        raw = jnp.einsum("BKGTH,BKSH->BKGTS", query, key, precision=lax.Precision.HIGHEST)
        logits = soft_capped(raw, self.soft_cap)
        if self.bias is not None:
            tile = slice_or_keep(slice_or_keep(self.bias, row, rows, 3), col, cols, 4)
            logits = logits + tile.astype(query.dtype)
        return logits

    def masked_scores(self, row, rows: int, col, cols: int) -> Float[Array, "B K G rows cols"]:
        """The logits of a tile, -inf where the key is not visible."""
        return jnp.where(self.mask.tile(row, rows, col, cols), self.scores(row, rows, col, cols), -jnp.inf)

    def part(self, b, batches: int, k, heads: int) -> "Inputs":
        """The operands of `batches` batch elements from `b` on and `heads` key heads from `k` on (may be traced)."""

        def pick(x, batch_axis, head_axis=None):
            if x is None:
                return None
            x = slice_or_keep(x, b, batches, batch_axis)
            return x if head_axis is None else slice_or_keep(x, k, heads, head_axis)

        mask = dataclasses.replace(
            self.mask,
            offset=pick(self.mask.offset, 0),
            query_lengths=pick(self.mask.query_lengths, 0),
            key_lengths=pick(self.mask.key_lengths, 0),
            query_segments=pick(self.mask.query_segments, 0),
            key_segments=pick(self.mask.key_segments, 0),
            dense=pick(self.mask.dense, 0, 1),
        )
        return dataclasses.replace(
            self,
            query=pick(self.query, 0, 1),
            key=pick(self.key, 0, 1),
            value=pick(self.value, 0, 1),
            beta=slice_or_keep(self.beta, k, heads, 0) if self.beta.ndim else self.beta,
            bias=pick(self.bias, 0, 1),
            mask=mask,
        )


def prepare(
    method: Method,
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    temperature=1.0,
    logits_soft_cap=None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    params=None,
    rng=None,
) -> Inputs:
    """Checks the arguments of `attention.dot_product_attention` and lays them out for `method`.

    Raises:
        TypeError: a dtype is not one that attention takes.
        ValueError: a shape or a range is wrong; the message names the argument and what was expected.
        UnsupportedError: `method` cannot honour an argument; the message names the methods that can.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method is {method!r}: expected an object like Exact(); attention.parse_method reads a name")
    query, key, value = checked_operands(query, key, value)
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    beta = inverse_temperature(scale, temperature, head_dim=H, num_heads=N, dtype=dtype)
    query_segment_ids, key_value_segment_ids = checked_segments(query_segment_ids, key_value_segment_ids, B, T, S)
    description = Mask(
        num_queries=T,
        num_keys=S,
        causal=is_causal,
        window=checked_window(local_window_size),
        query_lengths=checked_lengths("query_seq_lengths", query_seq_lengths, B, T),
        key_lengths=checked_lengths("key_value_seq_lengths", key_value_seq_lengths, B, S),
        query_segments=query_segment_ids,
        key_segments=key_value_segment_ids,
        dense=grouped_table("mask", mask, jnp.bool_, (B, N, T, S), K),
    )
    inputs = Inputs(
        query=jnp.einsum("BTKGH->BKGTH", (query.astype(dtype) * beta.reshape(1, 1, -1, 1)).reshape(B, T, K, N // K, H)),
        key=jnp.swapaxes(key, 1, 2),
        value=jnp.swapaxes(value, 1, 2),
        mask=dataclasses.replace(description, offset=_offset(description, causal_alignment)),
        bias=grouped_table("bias", bias, None, (B, N, T, S), K),
        soft_cap=checked_cap(logits_soft_cap, dtype),
        params=params,
        rng=rng,
        beta=beta.reshape(K, N // K) if beta.ndim else beta,
    )
    refuse_unsupported(method, inputs)
    return emptied(inputs)


def prepare_tokens(
    method: Method,
    query,
    key,
    value,
    *,
    scale=None,
    temperature=1.0,
    logits_soft_cap=None,
    local_window_size=None,
    params=None,
    rng=None,
) -> Inputs:
    """`prepare` for T new tokens of a causal sequence, as many queries as keys, with the options that `extend` takes.

    Raises:
        As `prepare`; ValueError also where the numbers differ, TypeError for an option that a state could not keep.
    """
    inputs = prepare(
        method,
        query,
        key,
        value,
        is_causal=True,
        scale=scale,
        temperature=temperature,
        logits_soft_cap=logits_soft_cap,
        local_window_size=local_window_size,
        params=params,
        rng=rng,
    )
    if inputs.mask.num_queries != inputs.mask.num_keys:
        counts = f"{inputs.mask.num_queries} queries and {inputs.mask.num_keys} keys"
        raise ValueError(f"extend: query and key have {counts}; expected as many of both")
    return inputs


def emptied(inputs: Inputs) -> Inputs:
    """The inputs with zeros in every slot that no query sees, and in every query that sees nothing.

    What was there, Inf and NaN included, can then reach neither an output nor a gradient.
    """
    if inputs.mask.uses_everything:
        return inputs
    queries, keys = inputs.mask.used()
    key, value = (jnp.where(keys[..., None], x, jnp.zeros_like(x)) for x in (inputs.key, inputs.value))
    query = jnp.where(queries[..., None], inputs.query, jnp.zeros_like(inputs.query))
    return dataclasses.replace(inputs, query=query, key=key, value=value)


def ungrouped(output: Float[Array, "B K G T *E"], like) -> Float[Array, "..."]:
    """`B K G T *E` back to `B T N *E`, without the batch axis where `like` has none."""
    B, K, G, T = output.shape[:4]
    output = jnp.moveaxis(output, 3, 1).reshape(B, T, K * G, *output.shape[4:])
    return output if jnp.ndim(like) == 4 else output[0]


def refuse_unsupported(method: Method, inputs: Inputs) -> None:
    """Raises UnsupportedError for what the capabilities of `method` rule out."""
    mask = inputs.mask
    asked = {
        "causal": ("is_causal", mask.causal),
        "window": ("local_window_size", mask.window is not None),
        "lengths": (
            "query_seq_lengths and key_value_seq_lengths",
            mask.query_lengths is not None or mask.key_lengths is not None,
        ),
        "segments": ("query_segment_ids", mask.query_segments is not None),
        "dense_mask": ("mask", mask.dense is not None),
        "bias": ("bias", inputs.bias is not None),
        "soft_cap": ("logits_soft_cap", inputs.soft_cap is not None),
        "cross": ("query and key of different lengths", mask.num_queries != mask.num_keys),
    }
    for capability, (argument, present) in asked.items():
        if present and not getattr(method.capabilities, capability):
            raise UnsupportedError(f"{type(method).__name__} does not take {argument}; {capable(capability)}")
    if method.capabilities.random and inputs.params is None and inputs.rng is None:
        raise ValueError(
            f"{type(method).__name__} draws constants: pass params=method.init(rng, num_heads=, head_dim=), or rng="
        )


def _offset(mask: Mask, alignment: str) -> Int[Array, " b"] | None:
    if alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment is {alignment!r}: expected 'top_left' or 'bottom_right'")
    if alignment == "top_left" or not (mask.causal or mask.window):
        return None
    queries = jnp.array([mask.num_queries]) if mask.query_lengths is None else mask.query_lengths
    keys = jnp.array([mask.num_keys]) if mask.key_lengths is None else mask.key_lengths
    return (keys - queries).astype(jnp.int32)
