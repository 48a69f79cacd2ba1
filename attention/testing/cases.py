"""Drawn operands, and one jit-compiled door through which the laws call a method."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attention.api import certified_attention, dot_product_attention
from attention.inputs import prepare, ungrouped
from attention.method import Method, Params
from attention.rounding import rounding_bound

# Equalities that hold in exact arithmetic are checked in float64. There `attention.rounding.rounding_bound` stays
# under 2**-40 of the largest value for the lengths and logits of the laws; any difference in algebra is of order
# one. The number between leaves room for methods whose rounding is a multiple of softmax's.
SAME = 2.0**-30


class Case(NamedTuple):
    """Queries, keys and values, `B T N H`, `B S K H` and `B S K E`."""

    query: Any
    key: Any
    value: Any

    def astype(self, dtype) -> "Case":
        return Case(*(jnp.asarray(x).astype(dtype) for x in self))


def draw(
    seed: int, *, B: int = 2, T: int = 13, S: int | None = None, N: int = 4, K: int = 2, H: int = 8, E=None
) -> Case:
    """Standard normal operands in NumPy float64; the same seed gives the same numbers everywhere."""
    rng = np.random.default_rng(seed)
    S = T if S is None else S
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H if E is None else E))
    return Case(*(rng.standard_normal(shape) for shape in shapes))


def families(seed: int, *, B: int, T: int, K: int = 2, N: int = 4, H: int = 8) -> Case:
    """`B` problems that a certificate finds hard: what bounds get wrong lies in the tails and the ties."""
    rng = np.random.default_rng(seed)
    query, key, value = draw(seed, B=B, T=T, N=N, K=K, H=H)
    for b in range(B):
        token = rng.integers(T)
        match b % 8:
            case 1:  # keys in clusters
                centres = rng.standard_normal((3, 1, K, H)) * 2
                key[b] = (centres[np.arange(T) % 3] + 0.1 * rng.standard_normal((T, 1, K, H)))[:, 0]
            case 2:  # a spectrum that falls as a power law
                decay = np.arange(1, H + 1) ** -1.0
                key[b], query[b] = key[b] * decay * 2, query[b] * decay * 2
            case 3:  # duplicated keys with different values
                key[b] = key[b, rng.integers(4, size=T)]
            case 4:  # one key far outside
                key[b, token] *= 20
            case 5:  # huge values where no query looks
                query[b], key[b] = np.abs(query[b]), np.abs(key[b])
                key[b, token] *= -1
                value[b, token] *= 1e4
            case 6:  # constant values: every weighting is right
                value[b] = value[b, :1]
            case 7:  # tiny and huge scales of the values
                value[b] *= 10.0 ** rng.uniform(-6, 6)
    return Case(query, key, value)


def params_for(method: Method, case: Case) -> Params:
    """Parameters from a fixed key, in the dtype of the case."""
    heads, size = case.query.shape[-2:]
    params = method.init(jax.random.key(0), num_heads=heads, head_dim=size)
    dtype = jnp.promote_types(jnp.asarray(case.query).dtype, jnp.float32)
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def run(method: Method, case: Case, form: str = "output", **options):
    """Calls the method under jit; arrays among the options are traced, the rest is static.

    Args:
        method: the method.
        case: operands.
        form: "output", "certified" for (output, certificate), or "residual" for (output, residual).
        options: of `attention.dot_product_attention`.
    """
    arrays, static = _told_apart(options)
    case = Case(*(jnp.asarray(x) for x in case))
    return _run(case, arrays, params_for(method, case), method=method, form=form, static=static)


def _told_apart(options: dict) -> tuple[dict, tuple]:
    """What jit traces, and what it compiles in."""
    arrays = {name: option for name, option in options.items() if isinstance(option, np.ndarray | Array)}
    return arrays, tuple(sorted((name, option) for name, option in options.items() if name not in arrays))


@functools.partial(jax.jit, static_argnames=("method", "form", "static"))
def _run(case, arrays, params, *, method, form, static):
    return call(method, case, params, form, **arrays, **dict(static))


def call(method: Method, case: Case, params, form: str = "output", **options):
    """As `run`, without jit."""
    if form == "certified":
        return certified_attention(*case, method=method, params=params, **options)
    return dot_product_attention(*case, method=method, params=params, return_residual=form == "residual", **options)


def gradients(method: Method, case: Case, cotangent, **options):
    """The gradients of sum(cotangent * output) to the three operands, under jit."""
    arrays, static = _told_apart(options)
    case = Case(*(jnp.asarray(x) for x in case))
    params = params_for(method, case)
    return _gradients(case, cotangent, arrays, params, method=method, static=static)


@functools.partial(jax.jit, static_argnames=("method", "static"))
def _gradients(case, cotangent, arrays, params, *, method, static):
    def loss(case):
        output = call(method, case, params, **arrays, **dict(static))
        return (output * jnp.asarray(cotangent, output.dtype)).sum()

    return jax.grad(loss)(case)


def rounding(method: Method, case: Case, **options):
    """What rounding may do to the output, `B T N`: the bound for a softmax over tiles of one key."""
    arrays, static = _told_apart(options)
    case = Case(*(jnp.asarray(x) for x in case))
    return method.capabilities.rounding * np.asarray(_rounding(case, arrays, method=method, static=static), np.float64)


@functools.partial(jax.jit, static_argnames=("method", "static"))
def _rounding(case, arrays, *, method, static):
    inputs = prepare(method, *case, rng=jax.random.key(0), **arrays, **dict(static))
    bound = rounding_bound(inputs, rescalings=case.key.shape[1], output_dtype=case.query.dtype)
    return ungrouped(bound, case.query)
