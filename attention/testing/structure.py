"""Laws of form: shapes, independence, transformations, and what the contract says of the object itself."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention.api import dot_product_attention
from attention.expressions import parse_method
from attention.method import METHODS, Method, UnsupportedError
from attention.testing.cases import PRECISIONS, SAME, Case, call, draw, params_for, run
from attention.testing.law import counted_compilations, expect, expect_bitwise, expect_same, law


@law()
def object_is_configuration(method: Method) -> None:
    expect(dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen, "is not a frozen dataclass")
    expect(hash(method) == hash(dataclasses.replace(method)), "equal methods have different hashes")
    expect(type(method)() == type(method)(), "has no default for some field")
    if METHODS.get(type(method).__name__.lower()) is type(method):
        expect(parse_method(repr(method)) == method, "does not print as the expression that makes it")
    fields = [getattr(method, field.name) for field in dataclasses.fields(method)]
    expect(not any(isinstance(x, jax.Array | np.ndarray) for x in fields), "holds an array")


@law()
def shape_dtype_finite(method: Method) -> None:
    for dtype, causal in PRECISIONS:
        causal, wide = causal and method.capabilities.causal, draw(0, E=5).astype(dtype)
        # What depends on the trace alone needs no program.
        traced = jax.eval_shape(functools.partial(call, method, params=params_for(method, wide)), wide)
        finite, _ = run(method, draw(0).astype(dtype), "both", is_causal=causal)
        for output, E in ((traced, 5), (finite, 8)):
            expect(output.shape == (2, 13, 4, E), f"output has shape {output.shape}, expected (2, 13, 4, {E})")
            expect(output.dtype == dtype, f"output has dtype {output.dtype}, expected {jnp.dtype(dtype)}")
        expect(np.isfinite(np.asarray(finite, np.float64)).all(), f"output is not finite in {jnp.dtype(dtype)}")


def _eager(method: Method, seed: int, **options):
    """A case of one batch element whose heads are repeated, and its output without jit: one program for three laws."""
    grouped = draw(seed, B=1)
    case = Case(grouped.query, *(np.repeat(x, 2, axis=2) for x in grouped[1:])).astype(jnp.float64)
    return case, call(method, case, params_for(method, case), **options)


@law(float64=True)
def batch_axis_is_optional(method: Method) -> None:
    case, batched = _eager(method, 1)
    alone = call(method, Case(*(x[0] for x in case)), params_for(method, case))
    expect_same(alone, batched[0], SAME, "T N H differs from the same within B T N H")


@law(float64=True)
def batch_elements_are_independent(method: Method) -> None:
    case, other = draw(2), draw(3)
    mixed = Case(*(np.stack([a[0], b[1]]) for a, b in zip(case, other, strict=True)))
    alone, together = (run(method, x) for x in (case, mixed))
    expect_bitwise(np.asarray(together)[0], np.asarray(alone)[0], "element 0 changed with element 1")


@law("head_independent", float64=True)
def heads_are_independent(method: Method) -> None:
    case, other = draw(2), draw(3)
    alone = np.asarray(run(method, case))
    for stays, goes in ((0, 1), (1, 0)):
        heads = (np.arange(4) // 2 == goes, np.arange(2) == goes, np.arange(2) == goes)  # of queries, keys and values
        mixed = Case(*(np.where(n[:, None], b, a) for a, b, n in zip(case, other, heads, strict=True)))
        output = np.asarray(run(method, mixed))
        mine = slice(2 * stays, 2 * stays + 2)
        expect_bitwise(output[:, :, mine], alone[:, :, mine], "a head changed with another")


@law(float64=True)
def same_call_same_bits(method: Method) -> None:
    case = draw(4)
    expect_bitwise(run(method, case), run(method, case), "two equal calls differ")


@law(float64=True)
def jit_equals_eager(method: Method) -> None:
    # Eager, scale and temperature are left out; under jit they are traced.
    case, eager = _eager(method, 5)
    expect_same(eager, run(method, case), SAME, "eager differs from jit")


@law(float64=True)
def vmap_equals_loop(method: Method) -> None:
    cases, temperatures = [draw(seed) for seed in (6, 7)], np.array([0.5, 2.0])
    stacked = Case(*(np.stack(x) for x in zip(*cases, strict=True)))
    params = params_for(method, cases[0])
    mapped = jax.vmap(lambda case, temperature: call(method, case, params, temperature=temperature))
    together = np.asarray(jax.jit(mapped)(stacked, temperatures))
    for case, temperature, output in zip(cases, temperatures, together, strict=True):
        expect_same(output, run(method, case, temperature=temperature), SAME, "vmap differs from a loop")


@law(float64=True)
def new_values_do_not_recompile(method: Method) -> None:
    cases = [draw(seed) for seed in (0, 1, 2)]
    run(method, cases[0], scale=0.3, temperature=1.0)
    equal = dataclasses.replace(method)
    with counted_compilations() as count:
        for case, scale, temperature in ((cases[1], 0.1, 2.0), (cases[2], 3.0, 0.25)):
            run(equal, case, scale=scale, temperature=temperature)
    expect(not count, f"two more scales and temperatures compiled {len(count)} programs, expected none")


@law(float64=True)
def a_second_eager_call_does_not_recompile(method: Method) -> None:
    _eager(method, 0, scale=0.3, temperature=1.0)
    equal = dataclasses.replace(method)
    with counted_compilations() as count:
        _eager(equal, 1, scale=0.2, temperature=3.0)
    expect(not count, f"a second call, with other values, compiled {len(count)} programs")


@law("group_independent", float64=True)
def grouped_heads_equal_repeated_heads(method: Method) -> None:
    case = draw(8)
    repeated = Case(case.query, *(np.repeat(x, 2, axis=2) for x in (case.key, case.value)))
    output = run(method, case)
    for b in range(2):
        alone = run(method, Case(*(x[b : b + 1] for x in repeated)))
        expect_same(output[b : b + 1], alone, SAME, "grouped heads differ from repeated heads")


@law()
def refuses_what_it_cannot_do(method: Method) -> None:
    query, key, value = draw(9).astype(jnp.float32)
    asked: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "window": {"local_window_size": 2},
        "lengths": {"key_value_seq_lengths": np.array([3, 13])},
        "segments": {"query_segment_ids": np.zeros((2, 13), np.int32)},
        "dense_mask": {"mask": np.ones((1, 1, 13, 13), bool)},
        "bias": {"bias": np.zeros((1, 1, 13, 13))},
        "soft_cap": {"logits_soft_cap": 5.0},
        "residual": {"return_residual": True},
    }
    params = params_for(method, Case(query, key, value))
    for capability, options in asked.items():
        if getattr(method.capabilities, capability):
            continue
        try:
            dot_product_attention(query, key, value, method=method, params=params, **options)
        except UnsupportedError as error:
            expect(type(method).__name__ in str(error), f"the error for {capability} does not name the method")
        else:
            expect(False, f"declares no {capability} and takes it all the same")


@law()
def cost_grows_with_length(method: Method) -> None:
    costs = [method.cost(n, n, num_heads=4, head_dim=64) for n in (64, 256, 4096)]
    for small, large in itertools.pairwise(costs):
        expect(0 < small.flops < large.flops, "operations are not positive and growing with the length")
        expect(0 < small.bytes < large.bytes, "bytes are not positive and growing with the length")
