"""Laws of decoding and differentiation: extend over any split, and gradients of first and second order."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from attention.method import Method
from attention.testing.cases import (
    ROOM,
    SAME,
    Case,
    attended,
    call,
    draw,
    extend,
    limit_cases,
    params_for,
    run_with_gradients,
)
from attention.testing.law import expect_same, law
from attention.testing.oracle import oracle_gradients

SPLITS = ((1,) * 13, (6, 1, 6), (1, 6, 6))
STEP, CLOSE = 1e-4, 1e-5


@law("decoding", "causal", float64=True)
def extend_over_any_split_equals_the_whole(method: Method) -> None:
    case = draw(31)
    whole = attended(method, case, is_causal=True, temperature=0.7)
    for split in SPLITS:
        state, outputs, start = method.init_state(2, 2, 8, ROOM, jnp.float64, num_heads=4), [], 0
        for size in split:
            tokens = Case(*(x[:, start : start + size] for x in case))
            state, output = extend(method, state, tokens, temperature=0.7)
            outputs.append(output)
            start += size
        expect_same(np.concatenate(outputs, 1), whole, SAME, f"the split {split} differs from the whole")


@law(float64=True)
def gradients_equal_finite_differences(method: Method) -> None:
    case = draw(32, B=1, T=4, N=2, K=1, H=3, E=2).astype(jnp.float64)
    params, causal = params_for(method, case), method.capabilities.causal
    at, unravelled = ravel_pytree((case, params.trained, {"scale": jnp.array(0.6), "temperature": jnp.array(1.2)}))

    def attend(x):
        case, trained, levers = unravelled(x)
        return call(method, case, params._replace(trained=trained), is_causal=causal, **levers).ravel()

    rng = np.random.default_rng(33)
    along, second = rng.standard_normal((2, at.size))
    weights = rng.standard_normal(4 * 2 * 2)

    def forward(x):  # the output, and J t
        return jax.jvp(attend, (x,), (along,))

    def reverse(x):  # J^T c
        return jax.vjp(attend, x)[1](weights)[0]

    @jax.jit
    def derivatives(x):
        """The output and its derivatives, each traced once, in one program."""
        (output, first), (_, second_order) = jax.jvp(forward, (x,), (second,))
        of_forward = second_order, jax.vjp(lambda x: forward(x)[1], x)[1](weights)[0]
        gradient, of_gradient = jax.jvp(reverse, (x,), (second,))
        of_reverse = of_gradient, jax.vjp(reverse, x)[1](along)[0]
        return {"": output, "forward": first, "reverse": gradient}, of_forward, of_reverse

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
    case = draw(34)
    cotangent = np.random.default_rng(33).standard_normal(case.query.shape)
    for what, options in limit_cases(method):
        expected = oracle_gradients(*case, cotangent, **options)
        _, actual = run_with_gradients(limit, case, cotangent, **options)
        for name, a, b in zip(Case._fields, actual, expected, strict=True):
            # A gradient sums 13 x 2 products of order ten, each rounded as an output is.
            expect_same(a, b, 64 * SAME, f"{what}: the gradient of {name} differs from the closed form")
