"""The model: causal, decodable, grouped, and a good home for a method's parameters and constants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from attention import positions
from attention.flax import Constant
from experiments.config import vocabulary
from experiments.levers import levers
from experiments.metrics import SHOWN, named_leaves
from experiments.model import LanguageModel
from experiments.steps import make_evaluate, make_init, make_step, model_graph

UNIT = float(jnp.finfo(jnp.float32).eps) / 2
KINDS = ("rotary", "learned", "sinusoidal")
EVERY = (*KINDS, "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(attention.Exact, register=False):
    """Exact attention whose output passes through a learned gain and a drawn rotation: both kinds of parameter."""

    capabilities = dataclasses.replace(attention.Exact.capabilities, random=True, exact=False)

    def init(self, rng, *, num_heads, head_dim):
        drawn = jax.random.orthogonal(rng, head_dim)
        return attention.Params(trained={"gain": {"head": jnp.ones((num_heads, 1))}}, constants={"rotation": drawn})

    def attend(self, inputs):
        output = super().attend(inputs)
        gain = inputs.params.trained["gain"]["head"].reshape(1, *output.shape[1:3], 1, 1)
        return jnp.einsum("BKGTE,EF->BKGTF", output * gain, inputs.params.constants["rotation"])


def built(run):
    """The run's model at its initial state, and its scale and temperature."""
    numbers = levers(run)
    state = jax.jit(make_init(run))(numbers)
    model = nnx.merge(model_graph(run), state.parameters, state.constants)
    return model, {"scale": numbers.scale, "temperature": numbers.temperature}


def compiled(model, method=LanguageModel.__call__):
    """A method of the model as a jitted function; eagerly, each operation would be compiled by itself."""
    graph, state = nnx.split(model)
    return functools.partial(jax.jit(lambda state, *args, **kw: method(nnx.merge(graph, state), *args, **kw)), state)


def some_tokens(run, batch=2, length=None):
    length = run.model.context if length is None else length
    return jnp.asarray(np.random.default_rng(1).integers(0, vocabulary(run), (batch, length)), jnp.int32)


def rounding(run, model):
    """A bound on how far two orders of float32 summation move a logit.

    An inner product of length n is off by at most n u |x||w| whatever its order; |x||w| exceeds the norm of a
    matrix product's result by at most about sqrt(n). So each product on the path perturbs the residual stream by
    n^(3/2) u of its norm, the norms pass relative perturbations on, and |logit| <= sqrt(D) |w| after the last.
    """
    m = run.model
    layer = 3 * m.width**1.5 + (m.width // m.heads) ** 1.5 + m.context**1.5 + 2 * m.width**1.5 + m.mlp_width**1.5
    largest = np.sqrt(m.width) * float(jnp.linalg.norm(model.head.kernel[...], axis=0).max())
    return largest * UNIT * (m.layers * layer + m.width**1.5)


@pytest.mark.parametrize("kind", EVERY)
def test_later_tokens_do_not_reach_earlier_logits(tiny, kind):
    run = tiny(model={"positions": kind})
    model, numbers = built(run)
    tokens = some_tokens(run)
    changed = tokens.at[:, 9:].set((tokens[:, 9:] + 1) % vocabulary(run))
    apply = compiled(model)
    before, after = apply(tokens, **numbers), apply(changed, **numbers)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert not np.array_equal(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize(("kind", "split"), [(kind, (5, 1, 1, 9)) for kind in EVERY] + [("rotary", (1,) * 16)])
def test_prefill_and_decode_give_the_logits_of_the_whole(tiny, kind, split):
    run = tiny(model={"positions": kind, "layers": 2}, scale=1.0)
    model, numbers = built(run)
    tokens = some_tokens(run)
    extend = compiled(model, LanguageModel.extend)
    state, pieces, start = model.init_state(2, max_length=16), [], 0
    for length in split:
        state, logits = extend(state, tokens[:, start : start + length], **numbers)
        pieces.append(logits)
        start += length
    assert int(state.length) == 16
    whole = compiled(model)(tokens, **numbers)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=0, atol=rounding(run, model))


@pytest.mark.parametrize("kind", EVERY)
def test_the_order_of_tokens_matters(tiny, kind):
    """Without positions the last logit of one layer depends on the set of earlier tokens alone."""
    run = tiny(model={"positions": kind}, scale=4.0)
    model, numbers = built(run)
    tokens = some_tokens(run)
    swapped = tokens.at[:, [0, 1]].set(tokens[:, [1, 0]])
    apply = compiled(model)
    moved = jnp.abs(apply(tokens, **numbers) - apply(swapped, **numbers))[:, -1].max()
    assert (moved > 2 * rounding(run, model)) == (kind != "none")


def test_learned_positions_end_at_the_context(tiny):
    model, _ = built(tiny(model={"positions": "learned"}))
    with pytest.raises(ValueError, match="max_length is 17"):
        model.init_state(1, max_length=17)


def test_rotary_scores_depend_on_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    near, far = (
        jnp.sum(positions.rotated(query, jnp.array([n + 3])) * positions.rotated(key, jnp.array([n])))
        for n in (0, 1000)
    )
    # Angles up to 1003 are rounded to 1003 u, and turn each vector by as much; H more for the inner product.
    bound = (4 * 1003 + 8) * UNIT * float(jnp.linalg.norm(query) * jnp.linalg.norm(key))
    assert abs(float(near - far)) <= bound
    assert abs(float(near - jnp.sum(query * key))) > 100 * bound


def test_bfloat16_activations_float32_parameters_and_logits(tiny):
    run = tiny(model={"dtype": "bfloat16"})
    model, numbers = built(run)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    logits, seen = compiled(model, LanguageModel.observed)(some_tokens(run), **numbers)
    assert logits.dtype == jnp.float32
    assert {x.dtype for pair in seen for x in pair} == {jnp.dtype("bfloat16")}
    exact, _ = built(tiny())
    # Two roundings to 8 bits a layer and sub-layer move the stream by a few units of 2^-8; the logits by as much.
    largest = np.sqrt(16) * float(jnp.linalg.norm(exact.head.kernel[...], axis=0).max())
    np.testing.assert_allclose(logits, compiled(exact)(some_tokens(run), **numbers), rtol=0, atol=32 * 2**-9 * largest)


def test_trained_parameters_are_trained_and_constants_are_kept(tiny):
    run = tiny(attention=Mixed(), model={"layers": 2})
    numbers, init = levers(run), jax.jit(make_init(run))
    state = init(numbers)
    drawn = named_leaves(state.constants)
    assert list(drawn) == [f"blocks/{layer}/attention/constants/rotation" for layer in range(2)]
    assert not np.array_equal(*drawn.values())  # each layer draws its own
    other = init(numbers._replace(seed=jnp.uint32(1)))
    assert not np.array_equal(
        *(named_leaves(s.constants)["blocks/0/attention/constants/rotation"] for s in (state, other))
    )
    after, _ = jax.jit(make_step(run))(state, {"tokens": some_tokens(run, 4, 17)}, numbers)
    jax.tree.map(np.testing.assert_array_equal, state.constants, after.constants)
    name = "blocks/1/attention/trained/gain/head"
    assert np.all(named_leaves(state.parameters)[name] != named_leaves(after.parameters)[name])


def test_a_method_for_each_layer(tiny):
    run = tiny(model={"layers": 2, "layer_methods": ("Exact", "Exact()")})
    model, _ = built(run)
    assert [block.attention.method for block in model.blocks] == [attention.Exact()] * 2
    with pytest.raises(ValueError, match="one for each of 2 layers"):
        make_init(tiny(model={"layers": 2, "layer_methods": ("Exact",)}))
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        make_init(tiny(model={"layers": 2, "layer_methods": ("Exact", "Exct")}))


def test_constants_are_no_parameters(tiny):
    model, _ = built(tiny(attention=Mixed()))
    assert not set(named_leaves(nnx.state(model, nnx.Param))) & set(named_leaves(nnx.state(model, Constant)))


def test_evaluation_reports_attention_by_layer_and_head_between_its_limits(tiny):
    run = tiny(model={"layers": 2, "layer_methods": ("Exact", "TopK(k=3)")})
    numbers = levers(run)
    state = jax.jit(make_init(run))(numbers)
    evaluate = jax.jit(make_evaluate(run))
    batch = {"tokens": some_tokens(run, 4, 17)}
    mean = np.log(np.arange(1, 17)).mean()  # of a uniform distribution over the 1 to 16 visible keys
    found = evaluate(state, batch, numbers._replace(scale=jnp.float32(0)))
    assert {name: x.shape for name, x in found.items()} == {"loss": ()} | dict.fromkeys(SHOWN, (2, 4))
    assert list(SHOWN) == list(attention.Diagnostics._fields)
    np.testing.assert_array_equal(found["monotonicity"], 1)
    flat = found["entropy"]
    np.testing.assert_allclose(flat, np.full((2, 4), mean), rtol=64 * UNIT)
    sharp = evaluate(state, batch, numbers._replace(evaluate_temperature=jnp.float32(1e-3)))["entropy"]
    assert np.all(sharp < mean / 2)
