"""Any method inside Flax's own layers, and a layer of our own around any method."""

import functools
import inspect
import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from attention.flax import Constant, MultiHeadAttention, attention_fn
from attention.testing.cases import SAME, Case, draw
from attention.testing.oracle import oracle

T, N, H = 13, 4, 8
D = N * H
CHUNKED = attention.Chunked(query_chunk=5, key_chunk=3)
TOKENS, COTANGENT = np.random.default_rng(0).standard_normal((2, 2, T, D))
# One method for each way to decode; the laws hold every method to its own.
DECODING = {cls.extend: cls.examples()[0] for cls in [*attention.METHODS.values()][::-1] if cls.capabilities.decoding}


# Flax's layers. In float64, where flax's own attention is in float64 too once it is not left to jax.nn (linen
# never does; nnx does without a dropout rate), equality up to rounding is equality up to SAME: see its comment.


def visible_somewhere(seed):
    """A mask `2 N T T` that leaves each row a key."""
    return np.random.default_rng(seed).random((2, N, T, T)) < 0.6 + np.eye(T)


MASKS = {
    "random": visible_somewhere(1),
    "causal": np.broadcast_to(np.tril(np.ones((T, T), bool)), (2, N, T, T)),
    "padding": np.broadcast_to(np.arange(T) < np.array([5, T])[:, None, None, None], (2, N, T, T)),
}


@functools.cache
def linen_layer(method=None):
    """Variables, and jitted output and gradients, of linen's layer around `method`, or around what it has itself."""
    own = {} if method is None else {"attention_fn": attention_fn(method)}
    layer = flax.linen.MultiHeadDotProductAttention(
        N, dtype=jnp.float64, param_dtype=jnp.float64, dropout_rate=0.3, deterministic=True, **own
    )
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 2, D)))
    return variables, _with_gradients(lambda variables, x, mask: layer.apply(variables, x, mask=mask))


@functools.cache
def nnx_layer(method=None):
    """As `linen_layer`, for nnx, with two key heads."""
    own = {} if method is None else {"attention_fn": attention_fn(method)}
    layer = nnx.MultiHeadAttention(
        N,
        D,
        num_kv_heads=2,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        dropout_rate=0.3,
        deterministic=True,
        decode=False,
        keep_rngs=False,
        rngs=nnx.Rngs(0),
        **own,
    )
    graph, state = nnx.split(layer)
    return state, _with_gradients(lambda state, x, mask: nnx.merge(graph, state)(x, mask=mask))


def _with_gradients(apply):
    def loss(variables, x, mask):
        output = apply(variables, x, mask)
        return (output * COTANGENT).sum(), output

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize(
    ("layer", "method"), [(linen_layer, CHUNKED), (nnx_layer, CHUNKED), (nnx_layer, attention.Exact())]
)
def test_flax_layers_equal_themselves_around_an_exact_method(layer, method):
    with jax.enable_x64(True):
        (variables, theirs), (_, ours) = layer(), layer(method)
        for mask in MASKS.values():
            (_, expected), gradients = theirs(variables, TOKENS, mask)
            (_, output), own_gradients = ours(variables, TOKENS, mask)
            np.testing.assert_allclose(output, expected, rtol=0, atol=SAME)
            # A gradient sums 2 x 13 products of order ten, each rounded as an output is.
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=64 * SAME), own_gradients, gradients
            )


def test_every_argument_that_flax_gives_is_named():
    """For linen drops what it does not find by name, and nnx passes all of its own."""
    ours = inspect.signature(attention_fn()).parameters
    theirs = {**inspect.signature(flax.linen.dot_product_attention).parameters}
    theirs |= inspect.signature(nnx.dot_product_attention).parameters
    assert set(theirs) - set(ours) == {"promote_dtype"}  # which no layer passes on
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in ours.values())


FORMS = {
    "T S": ((T, T), (2, 3)),
    "1 1 S": ((1, 1, T), (2,)),
    "B 1 T 1": ((2, 1, T, 1), (2,)),
    "A B 1 T S": ((2, 3, 1, T, T), (2, 3)),
    "1 B N 1 S": ((1, 3, N, 1, T), (2, 3)),
    "no batch": ((N, T, T), ()),
}


@pytest.mark.parametrize(("shape", "batch"), FORMS.values(), ids=FORMS.keys())
def test_masks_and_biases_broadcast_over_any_batch(shape, batch):
    rng = np.random.default_rng(2)
    case = draw(3, B=math.prod(batch))
    mask, bias = rng.random(shape) < 0.7, rng.standard_normal(shape)
    given = (x.reshape(*batch, *x.shape[1:]) for x in case)
    with jax.enable_x64(True):
        output = np.asarray(jax.jit(attention_fn())(*given, bias=bias, mask=mask.astype(np.float32)))
    assert output.shape == (*batch, T, N, H)
    full = {
        name: np.broadcast_to(table, (*batch, N, T, T)).reshape(-1, N, T, T)
        for name, table in (("bias", bias), ("mask", mask))
    }
    np.testing.assert_allclose(output.reshape(-1, T, N, H), oracle(*case, **full)[0], rtol=0, atol=SAME)


def test_a_row_without_keys_gives_zero_and_no_gradient():
    mask = np.ones((2, 1, T, T), bool)
    mask[:, :, 3] = False

    @jax.jit
    def third_row(case):
        output, pull = jax.vjp(lambda case: attention_fn()(*case, mask=mask)[:, 3], case)
        return output, pull(jnp.ones_like(output))[0], nnx.dot_product_attention(*case, mask=mask)[:, 3]

    output, gradients, theirs = third_row(Case(q, k, v))
    assert not output.any()
    assert not any(gradient.any() for gradient in gradients)
    # Flax gives the mean of the values there; the mean of 13 numbers is rounded 13 times.
    mean = np.repeat(np.asarray(v).mean(1), 2, axis=1)
    np.testing.assert_allclose(theirs, mean, rtol=0, atol=26 * 2**-24 * float(jnp.abs(v).max()))


def test_caches_of_flax_decode_what_the_whole_gives():
    # linen
    with jax.enable_x64(True):
        x, options = TOKENS[:, :4], {"dtype": jnp.float64, "param_dtype": jnp.float64, "attention_fn": attention_fn()}
        causal = np.tril(np.ones((4, 4), bool))[None, None]
        layer = flax.linen.MultiHeadDotProductAttention(N, **options)
        decoder = layer.clone(decode=True)
        variables = decoder.init(jax.random.key(0), x)
        whole = jax.jit(layer.apply)({"params": variables["params"]}, x, mask=causal)
        step = jax.jit(functools.partial(decoder.apply, mutable=["cache"]))
        for i in range(4):
            output, changed = step(variables, x[:, i : i + 1])
            variables = variables | changed
            np.testing.assert_allclose(output[:, 0], whole[:, i], rtol=0, atol=SAME)

        # nnx
        layer = nnx.MultiHeadAttention(N, D, **options, rngs=nnx.Rngs(0))
        layer.init_cache(x.shape, jnp.float64)
        graph, state = nnx.split(layer)

        @jax.jit
        def advance(state, token):
            layer = nnx.merge(graph, state)
            output = layer(token, decode=True)
            return nnx.state(layer), output

        whole = jax.jit(lambda state: nnx.merge(graph, state)(x, is_causal=True, decode=False))(state)
        for i in range(4):
            state, output = advance(state, x[:, i : i + 1])
            np.testing.assert_allclose(output[:, 0], whole[:, i], rtol=0, atol=SAME)


q, k, v = draw(5).astype(jnp.float32)


class Drawn(attention.Exact, register=False):
    """Exact attention times a number that was drawn, plus one that is trained."""

    def init(self, rng, *, num_heads, head_dim):
        return attention.Params(trained={"shift": {"all": jnp.zeros(())}}, constants={"gain": jax.random.normal(rng)})

    def attend(self, inputs):
        params = inputs.params or self.init(inputs.rng, num_heads=N, head_dim=H)
        return params.constants["gain"] * super().attend(inputs) + params.trained["shift"]["all"]


def test_options_are_those_of_the_function():
    options = {"scale": 0.3, "temperature": jnp.array([0.5, 1.0, 2.0, 4.0]), "logits_soft_cap": 2.0}
    options |= {"local_window_size": (4, 1), "is_causal": True}
    params = Drawn().init(jax.random.key(0), num_heads=N, head_dim=H)
    for drawn in ({"params": params}, {"rng": jax.random.key(0)}):
        expected = attention.dot_product_attention(q, k, v, method=Drawn(), **options, **drawn)
        np.testing.assert_array_equal(attention_fn(Drawn(), **options, **drawn)(q, k, v), expected)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_causal_attention_of_unequal_lengths_says_how_it_is_aligned(alignment):
    with pytest.raises(ValueError, match="leave is_causal out"):
        attention_fn()(q[:, :5], k, v, is_causal=True)
    position = np.arange(5) + (T - 5 if alignment == "bottom_right" else 0)
    mask = np.arange(T) <= position[:, None]
    attend = jax.jit(attention_fn(causal_alignment=alignment), static_argnames="is_causal")
    output, expected = attend(q[:, :5], k, v, is_causal=True), attend(q[:, :5], k, v, mask=mask)
    # Each is within its own bound of the oracle, 2**-17 for these sizes (see rounding_bound).
    np.testing.assert_allclose(output, expected, rtol=0, atol=2.0**-16)


class Plain(attention.Exact, register=False):
    """Exact attention that leaves the precision of its products to the caller."""

    def attend(self, inputs):
        return jnp.einsum("BKGTH,BKSH,BKSE->BKGTE", inputs.query, inputs.key, inputs.value)


@pytest.mark.parametrize("precision", ["high", jax.lax.Precision.HIGH, ("default", "high")])
def test_precision_is_the_least_of_every_product(precision):
    attend = functools.partial(attention_fn(Plain()), precision=precision)
    assert str(jax.make_jaxpr(attend)(q, k, v)).count("(Precision.HIGH, Precision.HIGH)") == 2
    attend = functools.partial(attention_fn(CHUNKED), precision=precision)
    assert "Precision.HIGH," not in str(jax.make_jaxpr(attend)(q, k, v))  # HIGHEST stays


def test_dtype_is_that_of_the_layer_or_of_the_operands():
    half = functools.partial(attention_fn(), dtype=jnp.bfloat16)
    assert jax.eval_shape(half, q, k, v).dtype == jnp.bfloat16
    assert jax.eval_shape(attention_fn(), q.astype(jnp.bfloat16), k, v).dtype == jnp.float32


REFUSED = {
    "dropout": ({"dropout_rate": 0.1}, "flax.nnx.Dropout"),
    "weights": ({"module": object()}, "attention_steps"),
    "algorithm": ({"precision": "BF16_BF16_F32"}, "expected None, 'default'"),
    "einsum": ({"qk_attn_weights_einsum": jnp.einsum, "attn_weights_value_einsum": jnp.einsum}, "einsum"),
    "dot_general": ({"einsum_dot_general": jax.lax.dot_general}, "dot_general"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(attention.UnsupportedError, match=message):
        attention_fn()(q, k, v, **options)


def test_dropout_is_refused_in_training_alone():
    np.testing.assert_array_equal(
        attention_fn()(q, k, v, dropout_rate=0.1, deterministic=True), attention_fn()(q, k, v)
    )


def test_a_mask_is_refused_by_methods_without_one():
    attend = attention_fn(attention.Performer(features=16), rng=jax.random.key(0))
    with pytest.raises(attention.UnsupportedError, match=r"Performer does not take mask; methods that can: .*Exact"):
        attend(q, k, v, mask=jnp.ones((T, T)))


@pytest.mark.parametrize(
    ("operands", "options", "message"),
    [
        ((q[0, 0], k, v), {}, r"query has shape \(4, 8\)"),
        ((q, k[:1], v), {}, r"key has shape \(1, 13, 2, 8\)"),
        ((q.reshape(2, 1, T, N, H), k.reshape(1, 2, T, 2, H), v), {}, "key has shape"),
        ((q, k, v), {"mask": np.ones((3, 1, T, T))}, r"mask has shape \(3, 1, 13, 13\)"),
        ((q, k, v), {"bias": np.ones((2, 1, T, 5), np.float32)}, "bias has shape"),
        ((q, k, v), {"bias": np.ones((2, 2, 1, T, T), np.float32)}, "bias has shape"),
    ],
)
def test_wrong_shapes_are_refused(operands, options, message):
    with pytest.raises(ValueError, match=message):
        attention_fn()(*operands, **options)


# The layer of our own.


def layer64(**options):
    """A layer in float64, and a function that gives its jitted methods."""
    layer = MultiHeadAttention(D, N, num_kv_heads=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)

    def jitted(method=MultiHeadAttention.__call__, **static):
        graph, state = nnx.split(layer)
        run = jax.jit(lambda state, *args, **kw: method(nnx.merge(graph, state), *args, **static, **kw))
        return functools.partial(run, state)

    return layer, jitted


def rotated64(x, base):
    """Pairs (x_i, x_{i + H/2}) as complex numbers, turned."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half))[:, None]
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_layer_is_its_formula():
    rng = np.random.default_rng(6)
    with jax.enable_x64(True):
        layer, jitted = layer64(
            rotary_base=100.0, use_bias=True, logits_soft_cap=3.0, local_window_size=(6, 2), scale="1/H"
        )
        for linear in (layer.query, layer.key, layer.value, layer.output):
            linear.bias[...] = rng.standard_normal(linear.bias.shape)
        options = {
            "temperature": rng.uniform(0.2, 2, N),
            "key_value_seq_lengths": np.array([9, T]),
            "query_segment_ids": np.sort(rng.integers(2, size=(2, T))),
            "bias": rng.standard_normal((1, N, T, 1)),
            "mask": rng.random((2, 1, T, T)) < 0.8,
        }
        output = jitted(is_causal=True)(TOKENS, **options)
        q, k, v = (
            (TOKENS @ np.asarray(p.kernel[...]) + np.asarray(p.bias[...])).reshape(2, T, -1, H)
            for p in (layer.query, layer.key, layer.value)
        )
        q, k = rotated64(q, 100.0), rotated64(k, 100.0)
        heads, _ = oracle(
            q, k, v, scale=1 / H, logits_soft_cap=3.0, local_window_size=(6, 2), is_causal=True, **options
        )
        expected = heads.reshape(2, T, D) @ np.asarray(layer.output.kernel[...]) + np.asarray(layer.output.bias[...])
        np.testing.assert_allclose(output, expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("method", DECODING.values(), ids=lambda m: type(m).__name__)
def test_layer_decodes_with_any_method(method):
    can = method.capabilities
    options = {"logits_soft_cap": 2.0} if can.soft_cap else {}
    options |= {"local_window_size": (5, 0)} if can.window else {}
    with jax.enable_x64(True):
        layer, jitted = layer64(method=method, rotary_base=10_000.0, **options)
        tokens = TOKENS[:, :12]
        whole = jitted(is_causal=True)(tokens, temperature=0.7)
        extend, state = jitted(MultiHeadAttention.extend), layer.init_state(2, 12)
        for start in (0, 6):
            state, output = extend(state, tokens[:, start : start + 6], temperature=0.7)
            np.testing.assert_allclose(output, whole[:, start : start + 6], rtol=0, atol=SAME)
        assert int(state.length) == 12


def test_layer_attends_to_a_context_of_another_length():
    with jax.enable_x64(True):
        layer, jitted = layer64()
        context = np.random.default_rng(7).standard_normal((2, 5, D))
        q, k, v = jitted(MultiHeadAttention.projected)(TOKENS, context)
        expected = oracle(q, k, v)[0].reshape(2, T, D) @ np.asarray(layer.output.kernel[...])
        np.testing.assert_allclose(jitted()(TOKENS, context), expected, rtol=0, atol=SAME)


@pytest.mark.parametrize(("rule", "scale"), [("1/sqrt(H)", 1 / math.sqrt(H)), ("1/H", 1 / H), (0.2, 0.2)])
def test_scale_rules(rule, scale):
    with jax.enable_x64(True):
        assert layer64(scale=rule)[0].scale == scale


def test_learned_scale_is_one_trained_number_a_head():
    with jax.enable_x64(True):
        graph, state = nnx.split(layer64(scale="learned")[0])
        np.testing.assert_array_equal(state["scale"][...], np.full(N, 1 / math.sqrt(H)))

        def loss(state, **given):
            return (nnx.merge(graph, state)(TOKENS, **given) * COTANGENT).sum()

        @jax.jit
        def gradients(state, scale):
            return jax.grad(loss)(state)["scale"][...], jax.grad(lambda scale: loss(state, scale=scale))(scale)

        own, given = gradients(state, state["scale"][...])
        np.testing.assert_allclose(own, given, rtol=0, atol=64 * SAME)
        assert np.all(np.asarray(own) != 0)


def test_what_is_drawn_is_told_apart_from_what_is_trained():
    first, second = (MultiHeadAttention(D, N, method=Drawn(), rngs=nnx.Rngs(seed)) for seed in (0, 1))
    drawn, trained = (nnx.to_pure_dict(nnx.state(first, kind)) for kind in (Constant, nnx.Param))
    assert set(drawn) == {"constants"}
    assert set(trained) == {"query", "key", "value", "output", "trained"}
    assert trained["trained"]["shift"]["all"] == 0
    assert drawn["constants"]["gain"] != second.constants["gain"][...]


def test_activations_have_the_dtype_of_the_layer():
    layer = MultiHeadAttention(D, N, dtype=jnp.bfloat16, rotary_base=100.0, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((2, T, D), jnp.float32)
    seen = [*jax.eval_shape(layer.projected, x), jax.eval_shape(layer, x)]
    assert {y.dtype for y in seen} == {layer.init_state(1, 4).kept.key.dtype} == {jnp.dtype(jnp.bfloat16)}
    assert {y.dtype for y in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {jnp.dtype(jnp.float32)}


BAD = {
    "heads": ({"num_kv_heads": 3}, "num_kv_heads is 3: expected a divisor of num_heads = 4"),
    "width": ({"in_features": 30}, "in_features is 30: expected a multiple of num_heads = 4"),
    "odd": ({"head_dim": 7, "rotary_base": 100.0}, "head_dim is 7: expected an even number"),
    "none": ({"num_kv_heads": 0}, "num_kv_heads is 0: expected an integer of at least 1"),
    "rule": ({"scale": "1/h"}, r"unknown scale '1/h': did you mean '1/H'\?"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**{"in_features": D, "num_heads": N, "rngs": nnx.Rngs(0)} | options)


def test_tokens_of_another_size_are_refused():
    layer = MultiHeadAttention(D, N, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"context has shape \(2, 13, 8\): expected 3 axes, B T D with D = 32"):
        layer(jnp.ones((2, T, D)), jnp.ones((2, T, 8)))
