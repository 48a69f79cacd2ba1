"""From raw scores to logits: beta = scale / temperature, and the soft cap."""

import numbers
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from attention.checks import traced_check


def inverse_temperature(scale, temperature, *, head_dim: int, num_heads: int, dtype) -> Float[Array, "..."]:
    """The quotient beta = scale / temperature, the only thing that plain softmax knows of either.

    Args:
        scale: None for 1 / sqrt(head_dim), a number, or an array of shape `()` or `(N,)`; may be traced.
        temperature: a number or an array of shape `()` or `(N,)`, greater than 0; infinity gives beta = 0,
            the mean over the visible keys. May be traced.
        head_dim: H.
        num_heads: N.
        dtype: the dtype in which beta is computed, float32 or float64.

    Returns:
        beta, of shape `()` or `(N,)`.

    Raises:
        TypeError: an argument is no number.
        ValueError: a concrete argument has another shape, a temperature is 0, negative or NaN, a scale is
            not finite, or beta overflows. Traced arguments are checked under `jax.experimental.checkify`.
    """
    scale = 1.0 / np.sqrt(head_dim) if scale is None else scale
    for name, number in (("scale", scale), ("temperature", temperature)):
        if not isinstance(number, numbers.Real | np.ndarray | Array):
            raise TypeError(f"{name} is {number!r}: expected a number, or an array with one a head")
        if jnp.shape(number) not in ((), (num_heads,)):
            raise ValueError(f"{name} has shape {jnp.shape(number)}: expected () or one number a head, ({num_heads},)")
    _check_ranges(scale, temperature, dtype)
    scale, temperature = jnp.asarray(scale, dtype), jnp.asarray(temperature, dtype)
    if scale.ndim != temperature.ndim:
        scale, temperature = (jnp.broadcast_to(x, (num_heads,)) for x in (scale, temperature))
    return scale / temperature


def _check_ranges(scale, temperature, dtype) -> None:
    _check_range("temperature", temperature, lambda x: x > 0, "greater than 0")
    _check_range("scale", scale, lambda x: abs(x) < np.inf, "finite")
    if isinstance(scale, Tracer) or isinstance(temperature, Tracer):
        beta = jnp.asarray(scale, dtype) / jnp.asarray(temperature, dtype)
        traced_check(jnp.all(jnp.isfinite(beta)), "scale / temperature overflows: {beta}", beta=beta)
        return
    with np.errstate(divide="ignore", over="ignore"):
        rounded = np.asarray(temperature, np.float64).astype(dtype)
        beta = (np.asarray(scale, np.float64) / np.asarray(temperature, np.float64)).astype(dtype)
    if not np.all(np.isfinite(beta)) or np.any(rounded == 0):
        raise ValueError(
            f"scale / temperature = {scale} / {temperature} overflows {jnp.dtype(dtype).name}: raise the temperature"
        )


def _check_range(name: str, number, valid: Callable[[Any], Any], expected: str) -> None:
    if isinstance(number, Tracer):
        traced_check(jnp.all(valid(number)), f"{name} must be {expected}, got {{x}}", x=number)
    elif not np.all(valid(np.asarray(number, np.float64))):
        raise ValueError(f"{name} is {number}: expected a number {expected}")


def soft_capped(logits: Float[Array, "..."], cap: Float[Array, ""] | None) -> Float[Array, "..."]:
    """The logits as cap * tanh(logits / cap); as they are without a cap (Gemma 2, arXiv 2408.00118, section 2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
