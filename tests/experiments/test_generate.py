"""Generation: what the whole forward pass would have said, from a checkpoint that stays as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_model import compiled, rounding

import attention
from experiments.config import Run, to_dict
from experiments.generate import chosen, encoded, generated, main
from experiments.levers import evaluation_numbers, levers
from experiments.saved import from_dict, load
from experiments.steps import model_graph
from experiments.train import train

SENTENCE = "attention is a weighted mean of the values; "
PROMPT = np.frombuffer(b"attention is", np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_small):
    """The folder of a run on one sentence over and over, in which no letter has one successor alone."""
    place = tmp_path_factory.mktemp("generate")
    (place / "text.txt").write_text(SENTENCE * 300)
    run = make_small(place / "text.txt", place / "runs")(steps=60, evaluate_every=60, checkpoint_every=60)
    train(run)
    return run.folder / run.name


@functools.cache
def greedy(folder, expression=None):
    """The model, and 20 tokens after the prompt."""
    saved = load(folder, None if expression is None else attention.parse_method(expression))
    return saved, list(generated(saved, PROMPT, 20, temperature=0))


def assert_largest(saved, tokens):
    """Each token has the largest logit of the whole forward pass, wherever rounding cannot decide which one that is."""
    model = nnx.merge(model_graph(saved.run), saved.parameters, saved.constants)
    text = jnp.array([[*PROMPT.tolist(), *tokens]])
    logits = compiled(model)(text, **evaluation_numbers(saved.run, levers(saved.run)))[0, len(PROMPT) - 1 : -1]
    # In the order of the context, as the bound of `rounding` has it; the text here is longer than that by half.
    longer = dataclasses.replace(saved.run, model=dataclasses.replace(saved.run.model, context=text.shape[1]))
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    sure = first - second > 2 * rounding(longer, model)
    assert sure.mean() > 0.7
    np.testing.assert_array_equal(np.array(tokens)[sure], logits.argmax(-1)[sure])


def test_greedy_tokens_are_the_largest_logits_of_the_whole(folder):
    saved, tokens = greedy(folder)
    assert_largest(saved, tokens)
    assert len(set(tokens)) > 3


def test_a_method_that_is_exact_takes_the_place_of_another(folder):
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other, tokens = greedy(folder, "TopK(k=64)")
    assert other.run.attention == attention.TopK(k=64)
    assert other.drawn == ()
    assert_largest(greedy(folder)[0], tokens)
    assert kept == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_checkpoint_lacks_is_drawn_and_named(folder):
    method = attention.Performer(features=8)
    first, second = load(folder, method), load(folder, method)
    assert first.drawn == ("blocks/0/attention/constants/projection",)
    jax.tree.map(np.testing.assert_array_equal, first.constants, second.constants)
    trained = load(folder)
    jax.tree.map(np.testing.assert_array_equal, first.parameters, trained.parameters)


def test_a_seed_gives_one_text_and_a_small_nucleus_the_greedy_one(folder):
    saved, most_likely = greedy(folder)
    first, again, other = (list(generated(saved, PROMPT, 20, temperature=2.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert list(generated(saved, PROMPT, 20, top_p=1e-6, seed=1)) == most_likely
    hot = dataclasses.replace(saved.run, evaluate_temperature=100.0)
    assert list(generated(saved._replace(run=hot), PROMPT, 20, temperature=0)) != most_likely


def test_tokens_are_drawn_from_the_nucleus_at_their_probabilities():
    probabilities = np.array([0.15, 0.4, 0.05, 0.3, 0.1])
    draw = jax.jit(jax.vmap(chosen, in_axes=(None, 0, None, None, None)))

    def shares(temperature, top_p):
        numbers = (jax.random.key(0), jnp.float32(temperature), jnp.float32(top_p))
        tokens = draw(jnp.log(jnp.array(probabilities, jnp.float32)), jnp.arange(4000), *numbers)
        return np.bincount(tokens, minlength=5) / 4000

    squared = probabilities**2 / (probabilities**2).sum()
    nucleus = np.array([0, 0.4, 0, 0.3, 0]) / 0.7
    for expected, found in (
        (probabilities, shares(1.0, 1.0)),
        (squared, shares(0.5, 1.0)),
        (nucleus, shares(1.0, 0.6)),
        (np.eye(5)[1], shares(0.0, 1.0)),
        (np.eye(5)[1], shares(1.0, 0.4)),
    ):
        # Five standard deviations of a share of 4,000.
        assert np.all(abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000))


def test_the_command_writes_the_prompt_and_what_follows(folder, capsys):
    _, tokens = greedy(folder)
    assert main([str(folder), "--prompt", "attention is", "--tokens", "20", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"attention is{bytes(tokens).decode('utf-8', 'replace')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt", "x"], "nowhere holds no config.json"),
        (["RUN", "--prompt", ""], "prompt is empty"),
        (["RUN", "--prompt", "x", "--tokens", "0"], "tokens is 0"),
        (["RUN", "--prompt", "x", "--top-p", "0"], "top_p is 0"),
        (["RUN", "--prompt", "x", "--temperature", "-1"], "temperature is -1"),
        (["RUN", "--prompt", "x", "--attention-temperature", "0"], "evaluate_temperature is 0"),
        (["RUN", "--prompt", "x", "--method", "TopQ"], "unknown method 'topq'"),
    ],
)
def test_mistakes_are_named(folder, arguments, message, capsys):
    assert main([str(folder) if word == "RUN" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_is_read_back_as_it_was_written(tiny):
    run = tiny(attention=attention.TopK(k=3), soft_cap=2.0, model={"gated": True, "layer_methods": ("Exact()",)})
    assert from_dict(Run(), to_dict(run)) == run
    with pytest.raises(ValueError, match="unknown field of Model 'laiers': did you mean 'layers'"):
        from_dict(Run(), {"model": {"laiers": 2}})


def test_the_prompt_of_a_task_is_integers(tiny):
    run = tiny(data={"task": "copy", "symbols": 4})
    assert encoded(run, "3 1 4").tolist() == [3, 1, 4]
    with pytest.raises(ValueError, match="prompt is 'a b': expected integers, since the run is on copy"):
        encoded(run, "a b")
