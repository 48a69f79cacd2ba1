"""Laws of form: shapes, independence, transformations, and what the contract says of the object itself."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention.api import dot_product_attention
from attention.method import METHODS, Method, UnsupportedError, parse_method
from attention.testing.cases import SAME, Case, call, draw, params_for, run
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
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        output = run(method, draw(0, E=5).astype(dtype))
        expect(output.shape == (2, 13, 4, 5), f"output has shape {output.shape}, expected (2, 13, 4, 5)")
        expect(output.dtype == dtype, f"output has dtype {output.dtype}, expected {jnp.dtype(dtype)}")
        expect(jnp.isfinite(output).all(), f"output is not finite in {jnp.dtype(dtype)}")


@law(float64=True)
def batch_axis_is_optional(method: Method) -> None:
    case = draw(1, B=1)
    alone = run(method, Case(*(x[0] for x in case)))
    expect_same(alone, run(method, case)[0], SAME, "T N H differs from 1 T N H")


@law()
def batch_elements_are_independent(method: Method) -> None:
    case, other = draw(2).astype(jnp.float32), draw(3).astype(jnp.float32)
    mixed = Case(*(a.at[1].set(b[1]) for a, b in zip(case, other, strict=True)))
    expect_bitwise(run(method, mixed)[0], run(method, case)[0], "element 0 changed with element 1")


@law("head_independent")
def heads_are_independent(method: Method) -> None:
    case, other = draw(2).astype(jnp.float32), draw(3).astype(jnp.float32)
    alone, before, after = run(method, case), (slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2))
    for (stays, _), (goes, goes_too) in ((before, after), (after, before)):
        changed = (goes, goes_too, goes_too)  # heads of queries, keys and values
        mixed = Case(*(a.at[:, :, n].set(b[:, :, n]) for a, b, n in zip(case, other, changed, strict=True)))
        expect_bitwise(run(method, mixed)[:, :, stays], alone[:, :, stays], "a head changed with another")


@law()
def same_call_same_bits(method: Method) -> None:
    case = draw(4).astype(jnp.float32)
    expect_bitwise(run(method, case), run(method, case), "two equal calls differ")


@law(float64=True)
def jit_equals_eager(method: Method) -> None:
    case = draw(5).astype(jnp.float64)
    expect_same(call(method, case, params_for(method, case)), run(method, case), SAME, "eager differs from jit")


@law(float64=True)
def vmap_equals_loop(method: Method) -> None:
    cases = [draw(seed).astype(jnp.float64) for seed in (6, 7)]
    temperatures = jnp.array([0.5, 2.0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    params = params_for(method, cases[0])
    mapped = jax.vmap(lambda case, temperature: call(method, case, params, temperature=temperature))
    together = jax.jit(mapped)(stacked, temperatures)
    for case, temperature, output in zip(cases, temperatures, together, strict=True):
        expect_same(output, run(method, case, temperature=temperature), SAME, "vmap differs from a loop")


@law()
def new_values_do_not_recompile(method: Method) -> None:
    traces = 0

    @jax.jit
    def attend(case, params, scale, temperature):
        nonlocal traces
        traces += 1
        return call(method, case, params, scale=scale, temperature=temperature)

    for seed, scale, temperature in ((0, 0.3, 1.0), (1, 0.1, 2.0), (2, 3.0, 0.25)):
        case = draw(seed).astype(jnp.float32)
        attend(case, params_for(method, case), jnp.float32(scale), jnp.float32(temperature))
    expect(traces == 1, f"traced {traces} times for three scales and temperatures, expected once")


@law()
def a_second_eager_call_does_not_recompile(method: Method) -> None:
    cases = [draw(seed).astype(jnp.float32) for seed in (0, 1)]
    params = params_for(method, cases[0])
    call(method, cases[0], params, scale=0.3, temperature=1.0)
    equal = dataclasses.replace(method)
    with counted_compilations() as count:
        call(equal, cases[1], params, scale=0.2, temperature=3.0)
    expect(not count, f"a second call, with other values, compiled {len(count)} programs")


@law(float64=True)
def grouped_heads_equal_repeated_heads(method: Method) -> None:
    case = draw(8)
    repeated = Case(case.query, *(np.repeat(x, 2, axis=2) for x in (case.key, case.value)))
    expect_same(run(method, case), run(method, repeated), SAME, "grouped heads differ from repeated heads")


@law()
def refuses_what_it_cannot_do(method: Method) -> None:
    query, key, value = draw(9).astype(jnp.float32)
    asked: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "window": {"local_window_size": 2},
        "lengths": {"key_value_seq_lengths": jnp.array([3, 13])},
        "segments": {"query_segment_ids": jnp.zeros((2, 13), jnp.int32)},
        "dense_mask": {"mask": jnp.ones((1, 1, 13, 13), bool)},
        "bias": {"bias": jnp.zeros((1, 1, 13, 13))},
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
