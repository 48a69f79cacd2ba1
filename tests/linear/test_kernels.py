"""Feature maps that are no estimate of softmax, against their kernels with every weight written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from attention import CosFormer, Hedgehog, LinearElu, dot_product_attention
from attention.linear import distillation_loss
from attention.testing.cases import SAME, draw

TEMPERATURES = np.array([0.5, 1.0, 2.0, 4.0])


def elu(x, y, i, j):
    phi = lambda z: np.where(z > 0, 1 + z, np.exp(np.minimum(z, 0)))  # noqa: E731
    return np.einsum("BNTH,BNSH->BNTS", phi(x), phi(y))


def cosine(x, y, i, j, constant=1.0):
    products = np.einsum("BNTH,BNSH->BNTS", np.maximum(x, 0), np.maximum(y, 0))
    return (constant + products) * np.cos(np.pi / 2 * (i - j) / 32)


def cosh(x, y, i, j):
    return 2 * np.cosh(x[:, :, :, None] + y[:, :, None]).sum(-1)


def quadratic(kernel, query, key, value, temperature, causal):
    """Weights of x = q sqrt(beta) and y = k sqrt(beta), normalised over the visible keys."""
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    root = np.sqrt(1 / np.sqrt(query.shape[-1]) / temperature)[None, :, None, None]
    x, y = (np.moveaxis(z, 1, 2) * root for z in (query, key))
    i, j = np.arange(x.shape[2])[:, None], np.arange(y.shape[2])[None]
    weights = kernel(x, y, i, j) * ((j <= i) if causal else 1.0)
    return np.einsum("BNTS,BSNE->BTNE", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("method", "kernel"),
    [
        (LinearElu(chunk=4), elu),
        (CosFormer(max_length=32, chunk=4), cosine),
        (Hedgehog(chunk=4), cosh),
    ],
    ids=lambda x: getattr(x, "__name__", None) or type(x).__name__,
)
def test_output_is_the_kernel(method, kernel, causal):
    with jax.enable_x64(True):
        case = draw(1)
        attend = jax.jit(lambda *case: dot_product_attention(*case, method=method, temperature=t, is_causal=causal))
        t = TEMPERATURES
        np.testing.assert_allclose(attend(*case), quadratic(kernel, *case, t, causal), atol=SAME, rtol=0)


def test_without_its_constant_cosformer_has_no_temperature():
    """As in the paper: rectified products are proportional to beta, which cancels."""
    method = CosFormer(max_length=32, constant=0.0, chunk=4)
    query, key, value = draw(2)
    query[..., 0] = key[..., 0] = 1.0  # a positive part in common, so that no row is without weights
    with jax.enable_x64(True):
        attend = jax.jit(lambda t: dot_product_attention(query, key, value, method=method, temperature=t))
        paper = lambda *args: cosine(*args, constant=0.0)  # noqa: E731
        for t in (0.25, 8.0):
            expected = quadratic(paper, query, key, value, np.ones(4), False)
            np.testing.assert_allclose(attend(t), expected, atol=SAME, rtol=0)


def test_cosformer_refuses_what_is_longer_than_its_period():
    method = CosFormer(max_length=8)
    query, key, value = (jnp.asarray(x, jnp.float32) for x in draw(3, B=1, T=9))
    with pytest.raises(ValueError, match=r"CosFormer.max_length is 8: expected at least .* 9"):
        dot_product_attention(query, key, value, method=method)
    extend = jax.jit(checkify.checkify(lambda state, *new: method.extend(state, *new)))
    state = method.init_state(1, 2, 8, 8, jnp.float32)
    error, (state, output) = extend(state, query[:, :8], key[:, :8], value[:, :8])
    error.throw()
    assert np.isfinite(output).all()
    with pytest.raises(ValueError, match="max_length is 8"):
        method.extend(state, query[:, :1], key[:, :1], value[:, :1])
    error, (_, output) = extend(dataclasses.replace(state, length=jnp.int32(1)), query[:, :8], key[:, :8], value[:, :8])
    with pytest.raises(checkify.JaxRuntimeError, match=r"longer than CosFormer\.max_length"):
        error.throw()
    assert np.isnan(output).all()


@pytest.mark.parametrize("fields", [{"max_length": 0}, {"constant": -1.0}, {"constant": float("nan")}])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=f"CosFormer.{next(iter(fields))} is"):
        CosFormer(**fields)


def test_distillation_moves_the_weights_towards_those_of_softmax():
    """The loss is the cross-entropy, no less than the entropy of softmax, and training takes most of the rest away."""
    query, key, _ = draw(4, T=16, H=4)
    method = Hedgehog()
    with jax.enable_x64(True):
        params = method.init(None, num_heads=4, head_dim=4)

        def loss(trained):
            given = params._replace(trained=trained)
            return distillation_loss(query, key, method=method, params=given, is_causal=True)

        @jax.jit
        def trained(start, rate, steps):
            def step(_, at):
                return jax.tree.map(lambda x, g: x - rate * g, at, jax.grad(loss)(at))

            end = jax.lax.fori_loop(0, steps, step, start)
            return loss(start), loss(end)

        before, after = (float(x) for x in trained(params.trained, 3.0, 300))
    logits = np.einsum("BTNH,BSNH->BNTS", query, np.repeat(key, 2, axis=2)) / 2
    past = np.tri(16, dtype=bool)
    exact = np.where(past, np.exp(logits), 0)
    exact /= exact.sum(-1, keepdims=True)
    x, y = (np.moveaxis(z, 1, 2) / np.sqrt(2) for z in (query, np.repeat(key, 2, axis=2)))
    weights = np.where(past, cosh(x, y, None, None), 0)
    weights /= weights.sum(-1, keepdims=True)
    logarithms = [np.log(np.where(past, p, 1)) for p in (weights, exact)]
    expected, entropy = (-(exact * logarithm).sum(-1).mean() for logarithm in logarithms)
    assert abs(before - expected) <= SAME
    assert entropy < after
    assert after - entropy <= 0.5 * (before - entropy)


def test_parameters_of_other_heads_are_named():
    query = jnp.ones((1, 4, 2, 8))
    params = Hedgehog().init(None, num_heads=4, head_dim=8)
    with pytest.raises(ValueError, match=r"query_map has shape \(4, 8, 8\): expected \(2, 8, 8\)"):
        dot_product_attention(query, query, query, method=Hedgehog(), params=params)
