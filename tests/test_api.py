"""The public calls: jax's signature, its behaviour where we promise it, and errors that say what to do."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.testing.cases import draw
from attention.testing.oracle import oracle

CASE = draw(100).astype(jnp.float32)


def test_signature_is_a_superset_of_jax():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(attention.dot_product_attention).parameters
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_output_has_the_dtype_of_the_query(dtype):
    assert attention.dot_product_attention(*CASE.astype(dtype)).dtype == dtype


def test_float64_is_float64():
    with jax.enable_x64(True):
        case = draw(102)
        output = attention.dot_product_attention(*case)
        assert output.dtype == jnp.float64
        np.testing.assert_allclose(output, oracle(*case)[0], atol=1e-14)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"temperature": 0.5, "logits_soft_cap": 3.0}])
def test_steps_are_the_stages_of_the_output(options):
    steps = attention.attention_steps(*CASE, **options)
    repeated = jnp.repeat(CASE.key, 2, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", CASE.query, repeated, precision="highest")
    np.testing.assert_allclose(steps.scores, scores, rtol=2.0**-20, atol=2.0**-20)
    scaled = scores / math.sqrt(8) / options.get("temperature", 1.0)
    if "logits_soft_cap" in options:
        scaled = 3.0 * jnp.tanh(scaled / 3.0)
    np.testing.assert_allclose(steps.scaled_scores, scaled, rtol=2.0**-18, atol=2.0**-18)
    hidden = np.isneginf(steps.masked_scores)
    assert np.array_equal(hidden, np.broadcast_to(np.triu(np.ones((13, 13), bool), 1), hidden.shape)) == (
        "is_causal" in options
    )
    np.testing.assert_allclose(steps.weights.sum(-1), 1, atol=2.0**-20)
    np.testing.assert_allclose(steps.weights, oracle(*CASE, **options)[1], atol=2.0**-18)
    output = attention.dot_product_attention(*CASE, **options)
    np.testing.assert_allclose(steps.output, output, atol=2.0**-20)


def test_one_temperature_a_head():
    temperature = jnp.array([0.5, 1.0, 2.0, jnp.inf])
    together = attention.dot_product_attention(*CASE, temperature=temperature)
    for head, t in enumerate(temperature):
        alone = attention.dot_product_attention(*CASE, temperature=t)
        np.testing.assert_array_equal(together[:, :, head], alone[:, :, head])


def test_only_the_ratio_of_scale_and_temperature_counts():
    results = [attention.dot_product_attention(*CASE, scale=s, temperature=t) for s, t in ((0.25, 1), (0.5, 2), (2, 8))]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_certificate_has_the_axes_of_the_output():
    output, certificate = attention.certified_attention(*CASE)
    assert output.shape == (2, 13, 4, 8)
    assert certificate.error_bound.shape == certificate.dropped_mass.shape == (2, 13, 4)
    assert certificate.kind == "deterministic"
    alone = attention.certified_attention(*(x[0] for x in CASE))[1]
    assert alone.error_bound.shape == (13, 4)


q, k, v = CASE
BAD = {
    "rank": ({"query": q[0, 0]}, ValueError, "query has shape"),
    "mixed rank": ({"key": k[0]}, ValueError, "key has shape"),
    "dtype": ({"query": jnp.ones(q.shape, int), "key": k}, TypeError, "query has dtype int32"),
    "mixed dtype": ({"value": v.astype(jnp.bfloat16)}, TypeError, "value has dtype bfloat16"),
    "batch": ({"key": k[:1], "value": v[:1]}, ValueError, "expected B = 2"),
    "head size": ({"key": k[..., :4]}, ValueError, "H = 8"),
    "keys and values": ({"value": v[:, :5]}, ValueError, "value has shape"),
    "heads": ({"query": q[:, :, :3]}, ValueError, "query has 3 heads: expected a multiple of the 2"),
    "empty": ({"query": q[:, :0]}, ValueError, "no empty axis"),
    "mask shape": ({"mask": jnp.ones((2, 4, 13, 12), bool)}, ValueError, "mask has shape"),
    "mask rank": ({"mask": jnp.ones((1, 2, 4, 13, 13), bool)}, ValueError, "mask has shape"),
    "mask dtype": ({"mask": jnp.ones((13, 13))}, TypeError, "bias="),
    "bias shape": ({"bias": jnp.ones((3, 13, 13))}, ValueError, "bias has shape"),
    "bias dtype": ({"bias": jnp.ones((13, 13), bool)}, TypeError, "bias has dtype bool"),
    "temperature 0": ({"temperature": 0}, ValueError, "temperature is 0"),
    "temperature negative": ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
    "temperature NaN": ({"temperature": math.nan}, ValueError, "temperature is nan"),
    "one bad head": ({"temperature": np.array([1.0, 1.0, 0.0, 1.0])}, ValueError, "temperature is"),
    "temperature shape": ({"temperature": np.ones(3)}, ValueError, r"temperature has shape \(3,\)"),
    "temperature type": ({"temperature": "1"}, TypeError, "temperature is '1': expected a number"),
    "scale": ({"scale": math.inf}, ValueError, "scale is inf"),
    "overflow": ({"scale": 1e30, "temperature": 1e-30}, ValueError, "overflows float32"),
    "cap": ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap is 0.0"),
    "window": ({"local_window_size": (-1, 2)}, ValueError, r"local_window_size is \(-1, 2\)"),
    "alignment": ({"causal_alignment": "left"}, ValueError, "'bottom_right'"),
    "lengths shape": ({"key_value_seq_lengths": np.array([1, 2, 3])}, ValueError, "key_value_seq_lengths has shape"),
    "lengths range": ({"query_seq_lengths": np.array([1, 14])}, ValueError, "from 0 to 13"),
    "lengths dtype": ({"query_seq_lengths": np.array([1.0, 2.0])}, ValueError, "integers"),
    "segments": ({"query_segment_ids": np.zeros((2, 5), int)}, ValueError, "query_segment_ids has shape"),
    "segments dtype": ({"query_segment_ids": np.zeros((2, 13))}, ValueError, "query_segment_ids has dtype"),
    "implementation": ({"implementation": "flash"}, ValueError, "method="),
    "implementation and method": (
        {"implementation": "cudnn", "method": attention.Chunked()},
        ValueError,
        "expected one of them alone",
    ),
    "cudnn in float32": ({"implementation": "cudnn"}, attention.UnsupportedError, "Fused.*'cudnn'.*cannot do this"),
    "alien": ({"method": "exact"}, TypeError, "method"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_its_name(changed, error, message):
    with pytest.raises(error, match=message):
        attention.dot_product_attention(**{"query": q, "key": k, "value": v} | changed)


DECODING = [cls.examples()[0] for cls in attention.METHODS.values() if cls.capabilities.decoding]


@pytest.mark.parametrize("method", DECODING, ids=repr)
def test_extend_refuses_what_only_a_whole_sequence_has(method):
    """New tokens have a causal mask over the state; another would be dropped, and the output silently wrong."""
    state = method.init_state(1, 1, 8, 4, jnp.float32)
    token = jnp.ones((1, 1, 1, 8))
    for name in ("mask", "bias", "key_value_seq_lengths", "query_segment_ids", "is_causal"):
        with pytest.raises(TypeError, match=name):
            method.extend(state, token, token, token, **{name: None})
