"""Laws of decoding and differentiation: extend over any split, and gradients of first and second order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from attention.method import Method
from attention.testing.cases import ROOM, SAME, Case, call, draw, extend, params_for, possible, run, run_with_gradients
from attention.testing.law import expect_same, law
from attention.testing.oracle import oracle_gradients

SPLITS = ((13,), (1,) * 13, (6, 1, 6), (1, 6, 6))
STEP, CLOSE = 1e-4, 1e-5


@law("decoding", "causal", float64=True)
def extend_over_any_split_equals_the_whole(method: Method) -> None:
    case = draw(31)
    whole = run(method, case, is_causal=True, temperature=0.7)
    for split in SPLITS:
        state, outputs, start = method.init_state(2, 2, 8, ROOM, jnp.float64), [], 0
        for size in split:
            tokens = Case(*(x[:, start : start + size] for x in case))
            state, output = extend(method, state, tokens, temperature=0.7)
            outputs.append(output)
            start += size
        expect_same(np.concatenate(outputs, 1), whole, SAME, f"the split {split} differs from the whole")


@law(float64=True)
def gradients_equal_finite_differences(method: Method) -> None:
    case = draw(32, B=1, T=4, N=2, K=1, H=3).astype(jnp.float64)
    params, causal = params_for(method, case), method.capabilities.causal
    at, unravelled = ravel_pytree((case, params.trained, {"scale": jnp.array(0.6), "temperature": jnp.array(1.2)}))

    def attend(x):
        case, trained, levers = unravelled(x)
        return call(method, case, params._replace(trained=trained), is_causal=causal, **levers).ravel()

    rng = np.random.default_rng(33)
    along, second = rng.standard_normal((2, at.size))
    weights = rng.standard_normal(case.query.size)

    def forward(x):  # J t
        return jax.jvp(attend, (x,), (along,))[1]

    def reverse(x):  # J^T c
        return jax.vjp(attend, x)[1](weights)[0]

    @jax.jit
    def derivatives(x):
        """The output and its derivatives in one program, so that what they have in common is compiled once."""
        of_forward = jax.jvp(forward, (x,), (second,))[1], jax.vjp(forward, x)[1](weights)[0]
        of_reverse = jax.jvp(reverse, (x,), (second,))[1], jax.vjp(reverse, x)[1](along)[0]
        return {"": attend(x), "forward": forward(x), "reverse": reverse(x)}, of_forward, of_reverse

    def difference(name, direction):
        """Central differences in float64 with step 1e-4 err by 1e-8 times the third derivative, order one here."""
        ahead, behind = (derivatives(np.asarray(at) + step * direction)[0][name] for step in (STEP, -STEP))
        return (np.asarray(ahead) - np.asarray(behind)) / (2 * STEP)

    here, of_forward, of_reverse = jax.tree.map(np.asarray, derivatives(np.asarray(at)))
    for name, actual, expected in (
        ("forward", here["forward"], difference("", along)),
        ("reverse", here["reverse"] @ second, weights @ difference("", second)),
        ("forward of forward", of_forward[0], difference("forward", second)),
        ("reverse of forward", of_forward[1] @ second, weights @ difference("forward", second)),
        ("forward of reverse", of_reverse[0], difference("reverse", second)),
        ("reverse of reverse", of_reverse[1] @ second, along @ difference("reverse", second)),
    ):
        expect_same(actual, expected, CLOSE * (1 + np.abs(expected)), f"{name} differs from finite differences")


@law(float64=True)
def exact_limit_has_the_oracles_gradients(method: Method) -> None:
    limit = method if method.capabilities.exact else method.exact_limit(13)
    if limit is None:
        return
    rng = np.random.default_rng(33)
    cotangent = rng.standard_normal((2, 13, 4, 5))
    asked: list[list[tuple[tuple[str, ...], dict[str, Any]]]] = [
        [((), {"temperature": 0.5})],
        [
            (("lengths",), {"query_seq_lengths": np.array([13, 11]), "key_value_seq_lengths": np.array([5, 12])}),
            (("dense_mask",), {"mask": rng.random((2, 4, 13, 13)) < 0.5}),
        ],
        [
            (("causal", "window"), {"is_causal": True, "local_window_size": (5, 0)}),
            (("segments",), {"query_segment_ids": np.sort(rng.integers(3, size=(2, 13)))}),
        ],
    ]
    case = draw(34, E=5)
    for parts in asked:
        if options := possible(method, parts):
            expected = oracle_gradients(*case, cotangent, **options)
            _, actual = run_with_gradients(limit, case, cotangent, **options)
            for name, a, b in zip(Case._fields, actual, expected, strict=True):
                # A gradient sums 13 x 2 products of order ten, each rounded as an output is.
                expect_same(a, b, 64 * SAME, f"the gradient of {name} differs from the closed form ({options.keys()})")
