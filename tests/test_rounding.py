"""The rounding bound over drawn cases: no violation, and how near the worst case comes."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from attention import Exact
from attention.testing.cases import draw, rounding, run
from attention.testing.oracle import oracle


def worst_ratio(cases: int) -> float:
    """The largest error over bound; temperatures from 0.01 to 100, three dtypes, empty rows, T != S."""
    rng, worst = np.random.default_rng(0), 0.0
    for seed in range(cases):
        T, S = ((13, 13), (5, 64))[seed % 2]
        dtype = (jnp.float32, jnp.bfloat16, jnp.float16)[seed % 5 % 3]
        case = draw(seed, B=4, T=T, S=S).astype(dtype)
        options: dict[str, Any] = {
            "temperature": jnp.float32(10 ** rng.uniform(-2, 2)),
            "key_value_seq_lengths": rng.integers(0, S + 1, 4),
            "is_causal": bool(seed % 3),
        }
        error = np.asarray(run(Exact(), case, **options)).astype(np.float64) - oracle(*case, **options)[0]
        size, bound = np.linalg.norm(error, axis=-1), rounding(Exact(), case, **options)
        assert np.all(size <= bound), f"seed {seed}: {np.max(size - bound):.3g} above the bound"
        worst = max(worst, float(np.max(size[bound > 0] / bound[bound > 0], initial=0)))
    return worst


def test_rounding_bound_holds():
    worst = worst_ratio(36)
    print(f"\nworst error / bound over 36 draws of 4 problems: {worst:.3f}")
    assert worst > 0.01  # a bound a hundred times too wide says nothing


@pytest.mark.campaign
def test_rounding_bound_holds_in_the_long_run():
    print(f"\nworst error / bound over 3000 draws of 4 problems: {worst_ratio(3000):.3f}")
