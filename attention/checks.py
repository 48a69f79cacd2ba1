"""Checks of shapes, dtypes and ranges; every message names the argument, its value and what was expected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int


def checked_operands(query, key, value) -> tuple[Array, Array, Array]:
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim not in (3, 4) or x.ndim != query.ndim:
            raise ValueError(f"{name} has shape {x.shape}: expected the 4 axes B T N H, or 3, T N H, for all of them")
        if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits < 16:
            raise TypeError(f"{name} has dtype {x.dtype}: expected float16, bfloat16, float32 or float64")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}: expected {query.dtype}, the dtype of query")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}: expected no empty axis")
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    B, _, N, H = query.shape
    if (key.shape[0], key.shape[3]) != (B, H):
        raise ValueError(f"key has shape {key.shape}: expected B = {B} and H = {H}, as in query {query.shape}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value has shape {value.shape}: expected the B, S and K of key {key.shape}")
    if N % key.shape[2]:
        raise ValueError(f"query has {N} heads: expected a multiple of the {key.shape[2]} heads of key")
    return query, key, value


def checked_lengths(name: str, lengths, B: int, limit: int) -> Int[Array, " B"] | None:
    if lengths is None:
        return None
    if jnp.shape(lengths) != (B,) or not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
        raise ValueError(
            f"{name} has shape {jnp.shape(lengths)} and dtype {jnp.result_type(lengths)}: expected ({B},) integers"
        )
    if not isinstance(lengths, Tracer) and not all(0 <= n <= limit for n in np.asarray(lengths).tolist()):
        raise ValueError(f"{name} is {lengths}: expected lengths from 0 to {limit}")
    return jnp.asarray(lengths)


def checked_window(window, name: str = "local_window_size") -> tuple[int, int] | None:
    if window is None:
        return None
    window = (window, window) if isinstance(window, int) else tuple(window)
    if len(window) != 2 or not all(isinstance(size, int) and size >= 0 for size in window):
        raise ValueError(f"{name} is {window}: expected an integer of at least 0, or a pair (left, right)")
    return window


def checked_segments(queries, keys, B: int, T: int, S: int):
    if queries is None and keys is None:
        return None, None
    if queries is None or keys is None:
        if T != S:
            raise ValueError("query_segment_ids and key_value_segment_ids: expected both, since T != S")
        queries = keys = queries if keys is None else keys
    for name, ids, shape in (("query_segment_ids", queries, (B, T)), ("key_value_segment_ids", keys, (B, S))):
        if jnp.shape(ids) not in (shape, shape[1:] if B == 1 else shape):
            raise ValueError(f"{name} has shape {jnp.shape(ids)}: expected {shape}")
        if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
            raise ValueError(f"{name} has dtype {jnp.result_type(ids)}: expected integers")
    return jnp.asarray(queries).reshape(B, T), jnp.asarray(keys).reshape(B, S)


def checked_cap(cap, dtype):
    if cap is None:
        return None
    if jnp.shape(cap) != () or (not isinstance(cap, Tracer) and not 0 < cap < float("inf")):
        raise ValueError(f"logits_soft_cap is {cap}: expected one finite number greater than 0")
    return jnp.asarray(cap, dtype)


def grouped_table(name: str, table, dtype, shape, K: int) -> Bool[Array, "..."] | Float[Array, "..."] | None:
    """A mask or bias broadcastable to `B N T S`, as `B K G T S` with the axes of size 1 kept."""
    if table is None:
        return None
    table = jnp.asarray(table)
    boolean = dtype is not None
    if not (table.dtype == dtype if boolean else jnp.issubdtype(table.dtype, jnp.floating)):
        expected = "bool (an additive mask goes to bias=)" if boolean else "a floating dtype"
        raise TypeError(f"{name} has dtype {table.dtype}: expected {expected}")
    full = (1,) * (4 - table.ndim) + table.shape
    if len(full) != 4 or any(size not in (1, axis) for size, axis in zip(full, shape, strict=True)):
        raise ValueError(f"{name} has shape {table.shape}: expected something broadcastable to B N T S = {shape}")
    b, n, t, s = full
    return table.reshape(b, *((1, 1) if n == 1 else (K, n // K)), t, s)


@functools.partial(jax.jit, static_argnums=1)
def traced_check(holds: Bool[Array, ""], message: str, **numbers: Array) -> None:
    """`checkify.debug_check`, traced once a process for each message.

    Every trace of a check draws a new number into the program, so that tracing a model twice would give two
    different programs, and the persistent compilation cache would never find the second.
    """
    checkify.debug_check(holds, message, **numbers)
