"""Chunked attention against the oracle at any tile size, with every operand's derivative, in linear memory."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Chunked, Exact
from attention.inputs import Inputs
from attention.masks import Mask
from attention.testing.cases import SAME, Case, draw, rounding, run
from attention.testing.oracle import oracle, oracle_gradients

SIZES = [(13, 1, 1), (13, 4, 4), (13, 12, 10), (1, 1, 4)]  # T, and the sizes of its tiles; S = 11


def masks(T, S):
    """One of each masking argument, for B = 2 and N = 4."""
    rng = np.random.default_rng(0)
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "to the end": {"is_causal": True, "causal_alignment": "bottom_right"},
        "window": {"local_window_size": (3, 1)},
        "lengths": {"query_seq_lengths": np.array([T, T // 2]), "key_value_seq_lengths": np.array([0, S - 1])},
        "segments": {
            "query_segment_ids": np.sort(rng.integers(3, size=(2, T))),
            "key_value_segment_ids": np.sort(rng.integers(3, size=(2, S))),
            "is_causal": True,
        },
        "mask and bias": {"mask": rng.random((2, 1, T, S)) < 0.5, "bias": rng.standard_normal((1, 4, T, S))},
        "cap": {"logits_soft_cap": 2.0, "bias": np.where(rng.random((1, 1, T, S)) < 0.7, 0, -np.inf)},
    }


@pytest.mark.parametrize(("T", "R", "C"), SIZES)
@pytest.mark.parametrize("name", masks(13, 11))
def test_any_tile_size_is_within_the_bound(T, R, C, name):
    method, case = Chunked(query_chunk=R, key_chunk=C), draw(1, T=T, S=11, E=5).astype(jnp.float32)
    options = masks(T, 11)[name]
    expected, _ = oracle(*case, **options)
    error = np.linalg.norm(np.asarray(run(method, case, **options), np.float64) - expected, axis=-1)
    assert np.all(error <= rounding(method, case, **options))


@pytest.mark.parametrize("name", ["lengths", "mask and bias", "cap"])  # the laws see to the others
def test_gradients_of_every_operand_equal_the_exact_ones(name):
    options = masks(13, 11)[name]
    rng = np.random.default_rng(2)
    cotangents = rng.standard_normal((2, 13, 4, 5)), rng.standard_normal((2, 13, 4))
    shapes = ((2, 4, 13, 11), (1, 1, 1, 11), (2, 1, 13, 1))  # broadcast axes get the summed gradient
    biases = [rng.standard_normal(shape) for shape in shapes] if name == "lengths" else [None]

    def gradients(method, case, bias):
        def loss(case, bias, cap):
            given = options | ({} if bias is None else {"bias": bias})
            given |= {} if "bias" in options else {"logits_soft_cap": cap}
            output, residual = attention.dot_product_attention(*case, method=method, return_residual=True, **given)
            return (output * cotangents[0]).sum() + jnp.where(jnp.isfinite(residual), residual * cotangents[1], 0).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2) if bias is not None else (0, 2)))(case, bias, 3.0)

    with jax.enable_x64(True):
        case = Case(*(jnp.asarray(x) for x in draw(3, T=13, S=11, E=5)))
        for bias in biases:
            exact, chunked = (gradients(m, case, bias) for m in (Exact(), Chunked(query_chunk=5, key_chunk=3)))
            for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(exact), strict=True):
                # A gradient here sums at most 4 x 13 x 11 products of order ten, each rounded as an output is.
                np.testing.assert_allclose(a, b, rtol=0, atol=1024 * SAME)


def test_second_derivatives_equal_the_exact_ones():
    def hessian_product(method, case, direction):
        def loss(query, key):
            output = attention.dot_product_attention(query, key, case.value, method=method, is_causal=True)
            return (output**2).sum()

        def slope(query, key):
            return sum((g * d).sum() for g, d in zip(jax.grad(loss, (0, 1))(query, key), direction, strict=True))

        return jax.jit(jax.grad(slope, (0, 1)))(case.query, case.key)

    with jax.enable_x64(True):
        case, direction = (Case(*map(jnp.asarray, draw(seed, B=1, T=11))) for seed in (4, 5))
        exact, chunked = (
            hessian_product(m, case, direction[:2]) for m in (Exact(), Chunked(query_chunk=4, key_chunk=3))
        )
        for a, b in zip(chunked, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1024 * SAME)


def test_one_operand_alone_has_its_gradient():
    with jax.enable_x64(True):
        case, cotangent = draw(6), np.random.default_rng(6).standard_normal((2, 13, 4, 8))
        expected = oracle_gradients(*case, cotangent, is_causal=True)
        for i, name in enumerate(Case._fields):

            def loss(x, name=name):
                given = case._replace(**{name: x})
                method = Chunked(query_chunk=5, key_chunk=4)
                return (attention.dot_product_attention(*given, method=method, is_causal=True) * cotangent).sum()

            np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(case[i])), expected[i], rtol=0, atol=64 * SAME)


def test_gradients_under_vmap_with_lengths_of_each():
    lengths = jnp.array([[3, 9], [0, 13]])

    def loss(query, lengths):
        method = Chunked(query_chunk=4, key_chunk=4)
        case = draw(7)._replace(query=query)
        return (attention.dot_product_attention(*case, method=method, key_value_seq_lengths=lengths) ** 2).sum()

    with jax.enable_x64(True):
        queries = jnp.stack([draw(seed).query for seed in (8, 9)])
        together = jax.jit(jax.vmap(jax.grad(loss)))(queries, lengths)
        for query, n, gradient in zip(queries, lengths, together, strict=True):
            np.testing.assert_allclose(gradient, jax.grad(loss)(query, n), rtol=0, atol=64 * SAME)


PACKED = jnp.repeat(jnp.arange(4), 4)[None]  # segments of 4 tokens


def poisoned(**band):
    """Operands of 16 tokens, NaN in keys 12 and on, past every check: what is read of them cannot stay hidden."""
    query, key, value = (jnp.moveaxis(jnp.asarray(x, jnp.float32), 2, 1) for x in draw(10, B=1, T=16, N=1, K=1))
    key, value = (x.at[:, :, 12:].set(jnp.nan) for x in (key, value))
    return Inputs(
        query=query[:, :, None], key=key, value=value, beta=jnp.ones(()), mask=Mask(num_queries=16, num_keys=16, **band)
    )


@pytest.mark.parametrize(
    ("band", "clean"),
    [
        ({"causal": True}, slice(0, 12)),
        ({"window": (1, 1)}, slice(0, 8)),
        ({"causal": True, "key_lengths": jnp.array([9])}, slice(0, 16)),
        ({"query_segments": PACKED, "key_segments": PACKED}, slice(0, 12)),
    ],
)
def test_tiles_that_nothing_sees_are_not_read_in_either_direction(band, clean):
    method, inputs = Chunked(query_chunk=4, key_chunk=4), poisoned(**band)

    def loss(query):
        output = method.attend(dataclasses.replace(inputs, query=query))
        return output[:, :, :, clean].sum(), output

    slope, output = jax.grad(loss, has_aux=True)(inputs.query)
    assert jnp.isfinite(output[:, :, :, clean]).all()
    assert jnp.isfinite(slope[:, :, :, clean]).all()
    if clean != slice(0, 16):
        assert jnp.isnan(output).any(), "the poison works where it is read"


def test_runs_agree_bit_for_bit():
    case = draw(13, B=1, T=1024, N=2, K=2, H=64).astype(jnp.float32)

    def loss(case):
        output = attention.dot_product_attention(*case, method=Chunked(), is_causal=True)
        return (output**2).sum(), output

    run_all = jax.jit(jax.grad(loss, has_aux=True))
    first = run_all(case)  # on all threads: what each of them gets must not depend on which comes first
    for _ in range(4):
        chex.assert_trees_all_equal(run_all(case), first)


def temporaries(T, gradient, causal):
    def loss(query, key, value):
        output = attention.dot_product_attention(query, key, value, method=Chunked(), is_causal=causal)
        return (output**2).sum() if gradient else output

    operand = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else loss).lower(operand, operand, operand).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_temporaries_are_linear_in_the_length(gradient, causal):
    at_32k = temporaries(32768, gradient, causal)
    assert at_32k <= 64e6
    # Twice the length, at most twice the bytes; what does not grow (the tiles) only lowers the ratio.
    assert at_32k <= 2 * temporaries(16384, gradient, causal)


def test_gradients_of_bfloat16_do_not_accumulate_in_bfloat16():
    case = draw(11, B=1, T=256, N=1, K=1).astype(jnp.bfloat16)
    cotangent = np.ones((1, 256, 1, 8)) / 8

    def loss(case):
        method = Chunked(query_chunk=2, key_chunk=128)
        return (attention.dot_product_attention(*case, method=method).astype(jnp.float32) * cotangent).sum()

    expected = oracle_gradients(*case, cotangent)
    for a, b in zip(jax.jit(jax.grad(loss))(case), expected, strict=True):
        # Half a unit in the last place of bfloat16 is 2**-9 of the number; float32 sums over 256 rows of
        # contributions of both signs stay under 2**-16 of the largest. Summing 128 tiles in bfloat16 would not.
        assert np.all(np.abs(np.asarray(a, np.float64) - b) <= 2.0**-8 * np.abs(b) + 2.0**-14 * np.abs(b).max())


def test_many_heads_share_a_tile_of_keys():
    case = draw(12, B=1, T=7, S=9, N=6, K=2).astype(jnp.float32)
    program = str(jax.make_jaxpr(lambda *x: attention.dot_product_attention(*x, method=Chunked()))(*case))
    assert "f32[1,2,9,3,7]" in program  # the logits of 3 query heads of each key head
    assert "f32[1,6,9,8]" not in program  # no key a query head
    assert "f32[1,9,6,8]" not in program


@pytest.mark.parametrize("field", ["query_chunk", "key_chunk"])
@pytest.mark.parametrize("wrong", [0, -1, True])
def test_chunks_that_are_no_size_are_refused(field, wrong):
    with pytest.raises(ValueError, match=rf"Chunked\.{field} is .*expected an integer of at least 1"):
        Chunked(**{field: wrong})
