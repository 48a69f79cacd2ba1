"""Any method as the `attention_fn` of Flax's own layers, in nnx and in linen."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from attention.api import dot_product_attention
from attention.exact import Exact
from attention.method import Method, UnsupportedError


def attention_fn(
    method: Method = Exact(),
    *,
    scale: Any = None,
    temperature: Any = 1.0,
    logits_soft_cap: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    params: Any = None,
    rng: Any = None,
) -> Callable[..., Array]:
    r"""`method` as `attention_fn=` of `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`.

        attend(query, key, value, bias, mask, ...) = softmax(scale / temperature * Q K^T + bias) V

    by `method`, for queries `batch... T N H`, keys `batch... S K H` and values `batch... S K E` with any number of
    batch axes. `bias` and `mask` broadcast to `batch... N T S`, the mask in any dtype, where 0 hides. The output,
    `batch... T N E`, is in the `dtype` of the layer, or in the one to which the operands promote.

    Of the other things that a layer asks for: softmax statistics are always in float32 or float64, as
    `force_fp32_for_softmax` wants; `precision` is the least that any matrix product is computed at; dropped or
    sown attention weights, dot algorithms and einsums of the caller's own are refused.

    One thing differs from Flax on purpose: a row whose keys are all masked gives 0, not the mean of all values.
    A function is equal to itself alone: make it once, so that jit knows again the layer that holds it.

    Args:
        method: how to compute it; see `attention.METHODS`.
        scale, temperature, logits_soft_cap, local_window_size, rng: as in `attention.dot_product_attention`.
        is_causal: hides later keys in every call; nnx can also ask for it in a call, linen cannot. Unlike a
            mask, it is open to methods that take no dense mask.
        causal_alignment: "top_left", which is Flax's, or "bottom_right"; needed where T != S alone.
        params: what `method.init` returned. They are constants of the function: to train them, make it inside the
            loss, or use `attention.flax.MultiHeadAttention`.

    Cost and error bound: those of `method`.

    Raises:
        TypeError: a dtype is not one that attention takes.
        ValueError: a shape or a value is wrong; causal attention with T != S has no alignment.
        UnsupportedError: what the layer asks for is refused, or `method` cannot honour it (a cache of Flax's own,
            `decode=True`, is a dense mask); the message names the methods that can.

    Example:
        >>> import attention, attention.flax, jax
        >>> from flax import nnx
        >>> attend = attention.flax.attention_fn(attention.Chunked(), temperature=2.0)
        >>> layer = nnx.MultiHeadAttention(4, 32, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 13, 32)), is_causal=True).shape
        (2, 13, 32)
    """
    always_causal = is_causal

    # Every parameter by name: linen passes those that it finds in the signature and drops the others, the mask too.
    def attend(
        query,
        key,
        value,
        bias=None,
        mask=None,
        *,
        broadcast_dropout=True,
        dropout_rng=None,
        dropout_rate=0.0,
        deterministic=False,
        dtype=None,
        precision=None,
        module=None,
        is_causal=False,
        force_fp32_for_softmax=True,
        einsum_dot_general=None,
        qk_attn_weights_einsum=None,
        attn_weights_value_einsum=None,
    ):
        if not deterministic:
            _refuse_dropout(dropout_rate)
        _refuse_weights(module, einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)
        is_causal = always_causal or is_causal
        _check_shapes(query, key, value, aligned=causal_alignment is not None or not is_causal)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        batch = query.shape[:-3]
        with _at_least(precision):
            output = dot_product_attention(
                *(x.astype(dtype).reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)),
                bias=_one_batch("bias", bias, batch),
                mask=None if mask is None else _one_batch("mask", jnp.asarray(mask).astype(bool), batch),
                method=method,
                scale=scale,
                temperature=temperature,
                logits_soft_cap=logits_soft_cap,
                is_causal=is_causal,
                causal_alignment=causal_alignment or "top_left",
                local_window_size=local_window_size,
                params=params,
                rng=rng,
            )
        return output.reshape(*batch, *output.shape[-3:])

    return attend


def _refuse_dropout(rate: float) -> None:
    if rate > 0:
        raise UnsupportedError(
            f"dropout_rate is {rate}: attention weights are not dropped, since few methods have them all at hand; "
            f"expected 0 or deterministic=True; drop the layer's output instead (flax.nnx.Dropout)"
        )


def _refuse_weights(module, *products) -> None:
    if module is not None:
        raise UnsupportedError(
            "sow_weights is True: attention weights are not kept; "
            "attention.attention_steps(query, key, value, ...).weights computes them"
        )
    if any(product is not None for product in products):
        raise UnsupportedError(
            "an einsum or a dot_general for the attention weights was given: a method computes its own products; "
            "expected None"
        )


def _check_shapes(query, key, value, aligned: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3 or x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} has shape {x.shape}: expected the axes batch... T N H, with the batch axes of query "
                f"{query.shape}"
            )
    T, S = query.shape[-3], key.shape[-3]
    if not aligned and T != S:
        raise ValueError(
            f"is_causal with {T} queries and {S} keys: expected attention_fn(..., causal_alignment='top_left') or "
            f"'bottom_right' to say which key the first query sees; with decode=True, whose cache masks what is to "
            f"come, leave is_causal out"
        )


def _one_batch(name: str, table, batch: tuple[int, ...]):
    """A table broadcastable to `batch... N T S` as one broadcastable to `B N T S`, B the product of the batch."""
    if table is None:
        return None
    table = jnp.asarray(table)
    leading = table.shape[:-3]
    if math.prod(leading) == 1:
        return table.reshape(table.shape[-3:])
    padded = (1,) * (len(batch) - len(leading)) + leading
    if len(padded) != len(batch) or any(size not in (1, axis) for size, axis in zip(padded, batch, strict=True)):
        raise ValueError(f"{name} has shape {table.shape}: expected something broadcastable to {batch} N T S")
    return jnp.broadcast_to(table, batch + table.shape[-3:]).reshape(math.prod(batch), *table.shape[-3:])


def _at_least(precision) -> contextlib.AbstractContextManager:
    """The context in which no matrix product is less precise than `precision`.

    Products for which a method asks for more keep that; all others are computed at `precision`.
    """
    asked = precision if isinstance(precision, tuple) else (precision,)
    try:
        levels = [lax.Precision(each) for each in asked if each is not None]
    except ValueError as error:
        raise UnsupportedError(
            f"precision is {precision!r}: a method chooses the algorithm of its products; expected None, 'default', "
            f"'high' or 'highest', or a jax.lax.Precision"
        ) from error
    if not levels:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(max(levels, key=lambda level: level.value).name.lower())
