"""What jax promises of `jax.nn.dot_product_attention`, asked of it and of ours: a caller changes the import alone."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.testing.cases import Case, draw
from attention.testing.oracle import oracle, oracle_gradients

B, T, N, H = 2, 13, 4, 8
BETA, U = 1 / np.sqrt(H), 2.0**-24
CHUNKED = attention.Chunked(query_chunk=5, key_chunk=3)


def theirs(*operands, **options):
    """On accelerators products are rounded further unless asked not to be; ours ask by themselves."""
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(*operands, **options)


CALLS = {"jax.nn": theirs, "Chunked": functools.partial(attention.dot_product_attention, method=CHUNKED)}
both = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())

# Masks, biases and lengths as values of one program; what says nothing is True, 0 or the whole length.
_rng = np.random.default_rng(0)
SILENT = {
    "bias": np.zeros((1, N, T, T), np.float32),
    "mask": np.ones((B, 1, T, T), bool),
    "query_seq_lengths": np.full(B, T, np.int32),
    "key_value_seq_lengths": np.full(B, T, np.int32),
}
BIAS = {"bias": _rng.standard_normal((1, N, T, T)).astype(np.float32)}
MASK = {"mask": _rng.random((B, 1, T, T)) < 0.6 + np.eye(T)}
PADDING = {"query_seq_lengths": np.array([7, 4], np.int32), "key_value_seq_lengths": np.array([5, 13], np.int32)}
TABLES = {
    "nothing": {},
    "bias": BIAS,
    "mask": MASK,
    "padding": PADDING,
    "mask and padding": MASK | PADDING,
    "bias and mask": BIAS | MASK,
    "everything": BIAS | MASK | PADDING,
}
# Key heads, and what is compiled in: multi-head, grouped, multi-query; causal or not; windows of both kinds.
PROGRAMS = {
    "multi-head": (4, {}),
    "multi-query, one-sided window, scale": (1, {"local_window_size": (3, 0), "scale": 0.6}),
    "grouped, causal window of one number": (2, {"local_window_size": 2, "is_causal": True}),
}


@functools.partial(jax.jit, static_argnames=("call", "static"))
def differentiated(case, tables, cotangent, *, call, static):
    """Output, residual, and the gradients to the operands and the bias."""

    def attend(case, bias):
        return call(*case, **{**tables, "bias": bias}, **dict(static), return_residual=True)

    output, pull, residual = jax.vjp(attend, case, tables["bias"], has_aux=True)
    return output, residual, pull(cotangent.astype(output.dtype))


def expected(case, cotangent, options):
    """The oracle's output, weights and residual, and the gradients to the operands and the bias."""
    output, weights = oracle(*case, **options)
    q, k, v = (np.asarray(x, np.float64) for x in case)
    G = N // k.shape[2]
    k, v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    logits = options.get("scale", BETA) * np.einsum("btnh,bsnh->bnts", q, k) + options["bias"]
    best = weights.argmax(-1)[..., None]
    with np.errstate(divide="ignore"):
        residual = np.take_along_axis(logits - np.log(weights), best, -1)[..., 0].swapaxes(1, 2)
    cotangent = np.asarray(cotangent, np.float64)
    dp = np.einsum("btne,bsne->bnts", cotangent, v)
    change = weights * (dp - np.einsum("btne,btne->bnt", cotangent, output)[..., None])
    gradients = oracle_gradients(*case, cotangent, **options)
    return output, weights, residual, gradients, change.sum(0, keepdims=True)


class Rounding(NamedTuple):
    """The terms of docs/bounds.md in float32: errors of logits and sums, `B N T`, and the largest value and logit."""

    D: np.ndarray
    e: np.ndarray
    C: float
    L: np.ndarray

    def output(self, u_out=U):
        """What rounding may do to the output, `B T N`."""
        return (self.C * (2 * np.tanh(self.D / 2) + 2 * self.e / (1 - self.e) + 2 * u_out)).swapaxes(1, 2)

    def residual(self):
        """The logit's error, the sum's, and those of a logarithm and an addition, `B T N`."""
        return (self.D + 2 * self.e + 8 * U * (1 + self.L + np.log(T))).swapaxes(1, 2)


def gamma(n):
    return n * U / (1 - n * U)


def largest(x):
    return np.linalg.norm(np.asarray(x, np.float64), axis=-1).max()


def rounding(case, options) -> Rounding:
    """The bounds for these operands; -inf in a bias hides."""
    size = np.linalg.norm(np.asarray(case.query, np.float64), axis=-1).swapaxes(1, 2)
    score = options.get("scale", BETA) * size * largest(case.key)
    bias, S = np.asarray(options.get("bias", 0)), case.key.shape[1]
    L = score + np.abs(bias[np.isfinite(bias)]).max()
    e = gamma(S) + (2 * np.minimum(2 * L, 104) + 6 * (S + 2)) * U
    return Rounding(gamma(H + 5) * score + 12 * U * L, e, largest(case.value), L)


def gradient_bounds(case, weights, cotangent, options):
    r"""What rounding may do to the gradients of query, key, value (norms, `B T N`, `B S K` twice) and bias.

    A weight is off by a factor 1 + w, w = e^{2D} (1 + e) / (1 - e) - 1. With d the cotangent and C = max|v|,
    dp_s = d.v_s and delta = sum p dp are at most |d| C, and are off by gamma_E |d| C and
    (w + gamma_S + gamma_E) |d| C. So p (dp - delta), at most 2 p |d| C, is off by

        p |d| C r,    r = 3 w + 2 gamma_E + gamma_S + 4 u,

    which is what the bias gets, summed over the batch. Query and key get its products with beta k and beta q, whose
    sums over S, or T G, terms add 2 gamma; values get sum p d, off by p |d| (w + gamma). 1.01 covers products of u.
    """
    D, e, C, _ = rounding(case, options)
    G, S, E = N // case.key.shape[2], case.key.shape[1], case.value.shape[-1]
    beta = options.get("scale", BETA)
    size, d = (np.linalg.norm(np.asarray(x, np.float64), axis=-1).swapaxes(1, 2) for x in (case.query, cotangent))
    w = np.exp(2 * D) * (1 + e) / (1 - e) - 1
    r = 3 * w + 2 * gamma(E) + gamma(S) + 4 * U

    def by_key(per_query):  # the sum over the queries of a key head, B S K
        sums = np.einsum("bnts,bnt->bsn", weights, per_query)
        return sums.reshape(*sums.shape[:2], -1, G).sum(-1)

    dq = (beta * d * C * largest(case.key) * (r + 2 * gamma(S + 3))).swapaxes(1, 2)
    dk = beta * C * by_key(d * size * (r + 2 * gamma(T * G + 3)))
    dv = by_key(d * (w + gamma(T * G + 1)))
    dbias = (weights * (d * C * (r + 2 * gamma(B)))[..., None]).sum(0, keepdims=True)
    return [1.01 * bound for bound in (dq, dk, dv)], 1.01 * dbias


@both
@pytest.mark.parametrize(("heads", "static"), PROGRAMS.values(), ids=PROGRAMS.keys())
def test_outputs_residuals_and_gradients(call, heads, static):
    case = draw(1, B=B, T=T, N=N, K=heads, H=H).astype(jnp.float32)
    for tables in TABLES.values():
        options = {**SILENT, **tables, **static}
        weights = oracle(*case, **options)[1]
        sees = weights.any(-1).swapaxes(1, 2)
        # Rows that see nothing differ on purpose (below): they are not asked for.
        cotangent = np.where(sees[..., None], np.random.default_rng(2).standard_normal((B, T, N, H)), 0)
        cotangent = cotangent.astype(np.float32)
        got = differentiated(case, {**SILENT, **tables}, cotangent, call=call, static=tuple(static.items()))
        output, residual, (gradients, bias_gradient) = jax.tree.map(lambda x: np.asarray(x, np.float64), got)
        right, weights, right_residual, right_gradients, right_bias = expected(case, cotangent, options)
        bounds, bias_bound = gradient_bounds(case, weights, cotangent, options)
        limits = rounding(case, options)
        assert np.all(np.linalg.norm(output - right, axis=-1)[sees] <= limits.output()[sees])
        assert np.all(np.abs(residual - right_residual)[sees] <= limits.residual()[sees])
        for name, a, b, limit in zip(Case._fields, gradients, right_gradients, bounds, strict=True):
            tiny = U * np.linalg.norm(b, axis=-1)
            assert np.all(np.linalg.norm(a - b, axis=-1) <= limit + tiny), f"the gradient of {name}"
        assert np.all(np.abs(bias_gradient - right_bias) <= bias_bound + U * np.abs(right_bias))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    case = draw(3, B=B, T=T, N=N, K=2, H=H).astype(dtype)
    options = {**BIAS, **MASK, "is_causal": True}
    ours = jax.jit(functools.partial(CALLS["Chunked"], is_causal=True))(*case, BIAS["bias"], MASK["mask"])
    # Not under jit: on a CPU jax.nn takes float16 only where it can try one product after the other.
    peer = theirs(*case, **options)
    right, weights = oracle(*case, **options)
    sees, u_out = weights.any(-1).swapaxes(1, 2), float(jnp.finfo(dtype).eps) / 2
    bound = rounding(case, options).output(u_out)
    # jax rounds the weights to `dtype`, and may sum their products with the values in it.
    peer_bound = bound + (T + 2) * u_out / (1 - T * u_out) * largest(case.value)
    for got, limit in ((ours, bound), (peer, peer_bound)):
        assert got.dtype == dtype
        assert np.all(np.linalg.norm(np.asarray(got, np.float64) - right, axis=-1)[sees] <= limit[sees])


def test_gradients_in_bfloat16():
    """They are rounded once, at the end."""
    case = draw(3, B=B, T=T, N=N, K=2, H=H).astype(jnp.bfloat16)
    options = {**SILENT, **BIAS, **MASK, "is_causal": True}
    cotangent = jnp.asarray(np.random.default_rng(2).standard_normal((B, T, N, H)), jnp.bfloat16)
    tables = {name: options[name] for name in SILENT}
    static = (("is_causal", True),)
    _, _, (gradients, _) = differentiated(case, tables, cotangent, call=CALLS["Chunked"], static=static)
    _, weights, _, right, _ = expected(case, cotangent, options)
    bounds, _ = gradient_bounds(case, weights, cotangent, options)
    for name, a, b, limit in zip(Case._fields, gradients, right, bounds, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b, axis=-1)
        assert np.all(error <= limit + 1.01 * 2.0**-8 * np.linalg.norm(b, axis=-1)), f"the gradient of {name}"


CASE = draw(4, B=B, T=T, N=N, K=2, H=H).astype(jnp.float32)


def assert_close(output, case, **options):
    """Where the oracle sees a key: within the float bound of its output."""
    right, weights = oracle(*case, **options)
    sees, bound = weights.any(-1).swapaxes(1, 2), rounding(case, options).output()
    error = np.linalg.norm(np.asarray(output, np.float64) - right, axis=-1)
    assert sees.any()
    assert np.all(error[sees] <= bound[sees])


SHAPES = (((1, 1, 1, T), (B, 1, T, 1)), ((B, N, 1, T), (1, 1, T, T)), ((T, T), (N, 1, T)), ((1, N, T, T), (B, N, T, T)))


@both
def test_biases_and_masks_broadcast(call):
    rng = np.random.default_rng(5)
    pairs = [(rng.standard_normal(a).astype(np.float32), rng.random(b) < 0.8) for a, b in SHAPES]
    outputs = jax.jit(lambda case, pairs: [call(*case, bias, mask) for bias, mask in pairs])(CASE, pairs)
    for output, (bias, mask) in zip(outputs, pairs, strict=True):
        full = {"bias": np.broadcast_to(bias, (B, N, T, T)), "mask": np.broadcast_to(mask, (B, N, T, T))}
        assert_close(output, CASE, **full)


@both
def test_vmap_over_the_batch(call):
    mapped = jax.jit(jax.vmap(lambda case, bias, mask: call(*case, bias, mask), in_axes=(0, 0, None)))
    bias = np.random.default_rng(6).standard_normal((B, N, T, T)).astype(np.float32)
    mask = np.tril(np.ones((1, T, T), bool))
    assert_close(mapped(CASE, bias, mask), CASE, bias=bias, mask=np.broadcast_to(mask, (B, N, T, T)))


@both
def test_no_batch_and_unequal_lengths_causal_from_the_top_left(call):
    case = draw(7, B=1, T=5, S=T, N=N, K=2, H=H).astype(jnp.float32)
    output, residual = jax.jit(functools.partial(call, is_causal=True, return_residual=True))(*(x[0] for x in case))
    assert (output.shape, residual.shape) == ((5, N, H), (5, N))
    assert_close(output[None], case, is_causal=True)


q, k, v = CASE
REFUSED = {
    "axes of the query": {"query": q[0, 0]},
    "batch": {"key": k[:1], "value": v[:1]},
    "head size": {"key": k[..., :4], "value": v[..., :4]},
    "keys and values": {"value": v[:, :5]},
    "heads": {"query": q[:, :, :3]},
    "dtype": {"value": v.astype(jnp.bfloat16)},
    "axes of the mask": {"mask": np.ones((1, B, N, T, T), bool)},
    "shape of the mask": {"mask": np.ones((B, N, T, 12), bool)},
    "dtype of the mask": {"mask": np.ones((B, N, T, T), np.float32)},
    "shape of the bias": {"bias": np.ones((B, N, 12, T), np.float32)},
    "shape of the lengths": {"query_seq_lengths": np.array([1, 2, 3], np.int32)},
    "implementation": {"implementation": "none of them"},
}


@both
@pytest.mark.parametrize("wrong", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(call, wrong):
    with pytest.raises((ValueError, TypeError, NotImplementedError)):
        jax.eval_shape(lambda: call(**{"query": q, "key": k, "value": v} | wrong))


@functools.partial(jax.jit, static_argnames="call")
def departures(case, call):
    """Row 3 sees nothing by the mask, then by the bias; then a key that no row sees holds NaN; the residual's slope."""
    mask = jnp.ones((T, T), bool).at[3].set(False)
    query, key, value = case
    unseen = value.at[:, 4].set(jnp.nan)
    return (
        call(*case, mask=mask)[:, 3],
        call(*case, jnp.where(mask, 0.0, -jnp.inf))[:, 3],
        call(query, key, unseen, mask=jnp.ones((T, T), bool).at[:, 4].set(False)),
        jax.grad(lambda query: call(query, key, value, return_residual=True)[1].sum())(query),
    )


def test_where_ours_departs_on_purpose():
    """The list in docs/architecture.md."""
    masked, biased, poisoned, slope = departures(CASE, theirs)
    mean = np.repeat(np.asarray(v).mean(1), 2, axis=1)
    np.testing.assert_allclose(masked, mean, rtol=0, atol=2 * T * 2**-24 * float(jnp.abs(v).max()))
    assert np.isnan(biased).all()
    assert np.isnan(poisoned).all()
    assert not slope.any()

    masked, biased, poisoned, slope = departures(CASE, CALLS["Chunked"])
    assert not masked.any()
    assert not biased.any()
    assert_close(poisoned, CASE, mask=np.broadcast_to(np.arange(T) != 4, (B, N, T, T)))
    # The residual's slope in the query is beta sum p k: attention with the keys for values.
    assert_close(slope / BETA, Case(q, k, k))


def test_what_ours_takes_and_theirs_does_not():
    wide = jnp.concatenate([v, v], -1)
    lengths = np.array([5, 13], np.int64)
    for options in ({"value": wide}, {"key_value_seq_lengths": lengths.astype(np.int8)}):
        given = {"query": q, "key": k, "value": v} | options
        with pytest.raises(ValueError, match="should be"):
            theirs(**given)
        assert jax.eval_shape(lambda given=given: CALLS["Chunked"](**given)).shape[:3] == (B, T, N)
    with pytest.raises(ValueError, match="implementation"):
        attention.dot_product_attention(q, k, v, implementation="cudnn", method=CHUNKED)
