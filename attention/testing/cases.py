"""Drawn operands, and jit-compiled doors through which the laws call a method."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attention.api import certified_attention, dot_product_attention
from attention.exact import Exact
from attention.inputs import prepare, ungrouped
from attention.method import Method, Params
from attention.rounding import rounding_bound

# Equalities that hold in exact arithmetic are checked in float64. There `attention.rounding.rounding_bound` stays
# under 2**-40 of the largest value for the lengths and logits of the laws; any difference in algebra is of order
# one. The number between leaves room for methods whose rounding is a multiple of softmax's.
SAME = 2.0**-30
# Compilation is nearly all that the laws cost. Hence few programs serve them all: 13 tokens or LONG, float64 for what
# holds in exact arithmetic, PRECISIONS for what does not; laws that differ in numbers or in what is hidden share one.
LONG = 17  # 13 tokens, and 4 more for what must not exist
ROOM = 16  # tokens of the caches, which the laws extend by few different numbers of tokens, each a program
PRECISIONS = ((jnp.float32, True), (jnp.bfloat16, False), (jnp.float16, True))  # dtypes, and whether causal


class Case(NamedTuple):
    """Queries, keys and values, `B T N H`, `B S K H` and `B S K E`."""

    query: Any
    key: Any
    value: Any

    def astype(self, dtype) -> "Case":
        """In another dtype; rounded by NumPy, since JAX would compile a program for each shape."""
        with np.errstate(over="ignore"):
            return Case(*(jnp.asarray(np.asarray(x).astype(dtype)) for x in self))


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


def params_for(method: Method, case: Case, seed: int = 0) -> Params:
    """Parameters from the key of a seed, in the dtype of the case: drawn in float32 whatever that is, then widened."""
    heads, size = case.query.shape[-2:]
    dtype = jnp.promote_types(np.asarray(case.query).dtype, jnp.float32)
    widened = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(widened(x)), _drawn(method, heads, size, seed))


@functools.lru_cache
def _drawn(method: Method, heads: int, size: int, seed: int) -> Params:
    with jax.enable_x64(False):
        return jax.tree.map(np.asarray, _init(jax.random.key(seed), method=method, heads=heads, size=size))


@functools.partial(jax.jit, static_argnames=("method", "heads", "size"))
def _init(rng, *, method: Method, heads: int, size: int) -> Params:
    return method.init(rng, num_heads=heads, head_dim=size)


def run(method: Method, case: Case, form: str = "output", *, seed: int = 0, **options):
    """Calls the method under jit; numbers and arrays among the options are traced, the rest is static.

    Calls that differ in numbers alone share a program, those that leave scale and temperature out among them.

    Args:
        method: the method.
        case: operands.
        form: "output", "certified" for (output, certificate), "both" for a pair of these, of which XLA compiles once
            what they share, or "residual" for (output, residual).
        seed: of the parameters.
        options: of `attention.dot_product_attention`.
    """
    case, traced, static = _told_apart(case, options)
    return _run(case, traced, params_for(method, case, seed), method=method, form=form, static=static)


def run_with_gradients(method: Method, case: Case, cotangent, **options):
    """The output, and the gradients of sum(cotangent * output) to the three operands, from one program under jit."""
    case, traced, static = _told_apart(case, options)
    return _run_with_gradients(case, cotangent, traced, params_for(method, case), method=method, static=static)


def attended(method: Method, case: Case, **options):
    """The output alone, from the program of `run_with_gradients`."""
    return run_with_gradients(method, case, np.zeros((*case.query.shape[:3], case.value.shape[3])), **options)[0]


def masks(
    method: Method,
    *,
    causal: bool = False,
    query_lengths=(LONG, LONG),
    key_lengths=(LONG, LONG),
    query_segments=None,
    key_segments=None,
    mask=None,
) -> dict[str, Any]:
    """Options that give a method every mask it can take, for B = 2 and T = LONG; what is left out hides nothing.

    All problems of one `causal` share a program. The causal one has no lengths of queries and no dense mask, so that
    methods are also seen where these are None.
    """
    if causal:
        expected = query_lengths == (LONG, LONG) and mask is None
        assert expected, "a causal program has neither lengths of queries nor a dense mask"
    segments = np.zeros((2, LONG), int) if query_segments is None else query_segments
    theirs = segments if key_segments is None else key_segments
    parts = [
        (("lengths",), {"key_value_seq_lengths": np.array(key_lengths)}),
        (("segments",), {"query_segment_ids": np.array(segments), "key_value_segment_ids": np.array(theirs)}),
    ]
    if causal:
        return possible(method, parts) | {"is_causal": True}
    parts.append((("lengths",), {"query_seq_lengths": np.array(query_lengths)}))
    parts.append((("dense_mask",), {"mask": np.ones((2, 1, LONG, LONG), bool) if mask is None else mask}))
    return possible(method, parts)


def limit_cases(method: Method) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and options, for B = 2, T = 13, N = 4, of calls that see every option of a method in two programs.

    In each program every option acts in one call alone, the others being given such that they change nothing, and
    then all of them together.
    """
    rng = np.random.default_rng(21)
    shown, visible = np.ones((2, 4, 13, 13), bool), rng.random((2, 4, 13, 13)) < 0.6
    full, flat, one = np.array([13, 13]), np.zeros((1, 4, 13, 13)), np.zeros((2, 13), int)
    bias = rng.standard_normal(flat.shape)
    neutral = {
        "query_seq_lengths": full,
        "key_value_seq_lengths": full,
        "mask": shown,
        "bias": flat,
        "logits_soft_cap": np.array(1e9),  # the logits, to a relative 1e-18
        "scale": np.full(4, 0.5),
    }
    acting = {
        "lengths": {"query_seq_lengths": np.array([13, 6]), "key_value_seq_lengths": np.array([5, 12])},
        "mask": {"mask": visible},
        "bias": {"bias": bias},
        "-inf bias": {"bias": np.where(visible[:1], 0.0, -np.inf)},
        "soft cap": {"logits_soft_cap": np.array(2.0)},
        "scale a head": {"scale": np.array([0.1, 0.2, 0.5, 1.0])},
    }
    acting["all of them"] = {name: x for options in acting.values() for name, x in options.items()}
    window = possible(method, [(("window",), {"local_window_size": (3, 1)})])
    for what, options in {"none of them": {}, **acting}.items():
        yield what, _allowed(method, neutral | options) | window
    causal = {"is_causal": True} | possible(method, [(("window",), {"local_window_size": (5, 0)})])
    for what, ids in (("causal", one), ("causal segments", np.sort(rng.integers(3, size=(2, 13))))):
        if method.capabilities.causal:
            yield what, causal | possible(method, [(("segments",), {"query_segment_ids": ids})])


def _allowed(method: Method, options: dict[str, Any]) -> dict[str, Any]:
    needs = {"mask": "dense_mask", "bias": "bias", "logits_soft_cap": "soft_cap"}
    needs |= {name: "lengths" for name in options if name.endswith("lengths")}
    return possible(method, [((needs[name],) if name in needs else (), {name: x}) for name, x in options.items()])


def extend(method: Method, state, tokens: Case, *, temperature: float = 1.0):
    """`method.extend` under jit, with parameters as `run` has them."""
    tokens, traced, _ = _told_apart(tokens, {"temperature": temperature})
    return _extend(state, tokens, traced["temperature"], params_for(method, tokens), method=method)


def possible(method: Method, parts) -> dict[str, Any]:
    """The union of the options whose capabilities a method has: one call, and one program, for several options."""
    can = method.capabilities
    return {k: v for needs, part in parts if all(getattr(can, need) for need in needs) for k, v in part.items()}


def rounding(method: Method, case: Case, **options):
    """What rounding may do to the output, `B T N`: the bound for a softmax over tiles of one key."""
    case, traced, static = _told_apart(case, options)
    return method.capabilities.rounding * np.asarray(_rounding(case, traced, static=static), np.float64)


def _told_apart(case: Case, options: dict) -> tuple[Case, dict, tuple]:
    """The operands as arrays, what jit traces, and what it compiles in."""
    case = Case(*(jnp.asarray(x) for x in case))
    numbers = {"scale": 1 / np.sqrt(case.query.shape[-1]), "temperature": 1.0}
    traced = {name: np.asarray(options.get(name, default), np.float64) for name, default in numbers.items()}
    rest = {name: option for name, option in options.items() if name not in traced and option is not False}
    traced |= {name: option for name, option in rest.items() if isinstance(option, np.ndarray | Array)}
    return case, traced, tuple(sorted((name, option) for name, option in rest.items() if name not in traced))


@functools.partial(jax.jit, static_argnames=("method", "form", "static"))
def _run(case, traced, params, *, method, form, static):
    return call(method, case, params, form, **traced, **dict(static))


@functools.partial(jax.jit, static_argnames=("method", "static"))
def _run_with_gradients(case, cotangent, traced, params, *, method, static):
    output, transposed = jax.vjp(lambda case: call(method, case, params, **traced, **dict(static)), case)
    return output, transposed(jnp.asarray(cotangent, output.dtype))[0]


@functools.partial(jax.jit, static_argnames="method")
def _extend(state, tokens, temperature, params, *, method):
    return method.extend(state, *tokens, temperature=temperature, params=params)


@functools.partial(jax.jit, static_argnames="static")
def _rounding(case, traced, *, static):
    # Of a call's arguments alone: prepared for a method that takes all of them, it is one program for every method.
    inputs = prepare(Exact(), *case, **traced, **dict(static))
    bound = rounding_bound(inputs, rescalings=case.key.shape[1], output_dtype=case.query.dtype)
    return ungrouped(bound, case.query)


def call(method: Method, case: Case, params, form: str = "output", **options):
    """As `run`, without jit."""
    if form == "both":
        return tuple(call(method, case, params, one, **options) for one in ("output", "certified"))
    if form == "certified":
        return certified_attention(*case, method=method, params=params, **options)
    return dot_product_attention(*case, method=method, params=params, return_residual=form == "residual", **options)
