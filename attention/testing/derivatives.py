"""Laws of decoding and differentiation: extend over any split, and gradients of first and second order."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from attention.method import Method
from attention.testing.cases import SAME, Case, call, draw, gradients, params_for, run
from attention.testing.law import Violation, expect_same, law
from attention.testing.oracle import oracle_gradients

SPLITS = ((13,), (1,) * 13, (5, 8), (4, 1, 1, 7))


@law("decoding", "causal", float64=True)
def extend_over_any_split_equals_the_whole(method: Method) -> None:
    case = draw(31).astype(jnp.float64)
    params = params_for(method, case)
    whole = run(method, case, is_causal=True, temperature=0.7)
    extend = jax.jit(lambda state, *new: method.extend(state, *new, temperature=0.7, params=params))
    for split in SPLITS:
        state, outputs, start = method.init_state(2, 2, 8, 16, jnp.float64), [], 0
        for size in split:
            state, output = extend(state, *(x[:, start : start + size] for x in case))
            outputs.append(output)
            start += size
        expect_same(jnp.concatenate(outputs, 1), whole, SAME, f"the split {split} differs from the whole")


@law(float64=True)
def gradients_equal_finite_differences(method: Method) -> None:
    case = draw(32, B=1, T=4, N=2, K=1, H=3).astype(jnp.float64)
    params = params_for(method, case)
    levers = (jnp.array(0.6), jnp.array(1.2))
    causal = method.capabilities.causal

    @jax.jit
    def attend(case, trained, scale, temperature):
        given = params._replace(trained=trained)
        return call(method, case, given, is_causal=causal, scale=scale, temperature=temperature)

    try:
        # Central differences in float64 with step 1e-4 err by 1e-8 times the third derivative, order one here.
        check_grads(
            attend, (case, params.trained, *levers), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5, eps=1e-4
        )
    except AssertionError as error:
        raise Violation(f"a derivative differs from finite differences: {error}") from None


@law(float64=True)
def exact_limit_has_the_oracles_gradients(method: Method) -> None:
    limit = method if method.capabilities.exact else method.exact_limit(13)
    if limit is None:
        return
    can, rng = method.capabilities, np.random.default_rng(33)
    cotangent = rng.standard_normal((2, 13, 4, 5))
    asked = [
        ((), {"temperature": 0.5}),
        (("causal", "window"), {"is_causal": True, "local_window_size": (5, 0)}),
        (("lengths",), {"query_seq_lengths": np.array([3, 13]), "key_value_seq_lengths": np.array([5, 12])}),
        (("dense_mask",), {"mask": rng.random((2, 4, 13, 13)) < 0.5}),
        (("segments",), {"query_segment_ids": np.sort(rng.integers(3, size=(2, 13)))}),
    ]
    case = draw(34, E=5)
    for needs, options in asked:
        if all(getattr(can, need) for need in needs):
            expected = oracle_gradients(*case, cotangent, **options)
            actual = gradients(limit, Case(*case), cotangent, **options)
            for name, a, b in zip(Case._fields, actual, expected, strict=True):
                # A gradient sums 13 x 2 products of order ten, each rounded as an output is.
                expect_same(a, b, 64 * SAME, f"the gradient of {name} differs from the closed form ({options.keys()})")
