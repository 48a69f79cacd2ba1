"""Scale rules in the trainer: what is learned, what is traced, and that decoding and monitors share it."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from test_model import compiled, rounding, some_tokens

import attention
from experiments import programs, report
from experiments.axes import product
from experiments.campaign import execute, make_plan
from experiments.data import training_batches
from experiments.levers import evaluation_numbers, levers
from experiments.metrics import named_leaves
from experiments.model import LanguageModel
from experiments.presets import Sweep
from experiments.report import load_results
from experiments.steps import make_evaluate, make_init, make_step, model_graph

UNIT = float(jnp.finfo(jnp.float32).eps) / 2


def started(run, steps=0):
    """A model after some steps, the state, and what its calls take in evaluations."""
    numbers = levers(run)
    state, batches, step = jax.jit(make_init(run))(numbers), training_batches(run), jax.jit(make_step(run))
    for _ in range(steps):
        state, metrics = step(state, next(batches), numbers)
        assert int(metrics["nonfinite"]) == -1
    model = nnx.merge(model_graph(run), state.parameters, state.constants)
    return model, state, evaluation_numbers(run, numbers)


def test_a_learned_scale_starts_at_the_run_s_and_is_trained(tiny):
    for rule, start in (("learned", 0.5), ("qk-norm", math.log2(16 * 15))):
        run = tiny(model={"scale_rule": rule})
        before = started(run)[0].blocks[0].attention.scale[...]
        np.testing.assert_array_equal(before, np.full(4, start, np.float32))
    after = started(run, steps=1)[0].blocks[0].attention.scale[...]
    assert np.all(after != before)
    given = started(tiny(model={"scale_rule": "qk-norm"}, scale=3.0))[0].blocks[0].attention.scale[...]
    np.testing.assert_array_equal(given, np.full(4, 3.0))


def test_decoding_and_monitors_share_what_training_does(tiny):
    """With a learned scale that grows with the length, spectral projections, a gate and a soft cap at once."""
    model = {"scale_rule": "ssmax", "spectral": True, "gated": True}
    run = tiny(model=model, soft_cap=4.0, evaluate_temperature=0.5)
    model, state, numbers = started(run, steps=1)
    assert_singular_vectors_follow(started(run)[1], state)
    tokens = some_tokens(run)
    whole, seen = compiled(model, LanguageModel.observed)(tokens, **numbers)
    extend, decoding, pieces = compiled(model, LanguageModel.extend), model.init_state(2, max_length=16), []
    for start in (0, 8):
        decoding, logits = extend(decoding, tokens[:, start : start + 8], **numbers)
        pieces.append(logits)
    # Norms, gates and caps have slopes of at most one; SSMax multiplies scores, and their rounding, by ln 16 < 3.
    bound = 3 * rounding(run, model)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=0, atol=bound)
    # The layer's entropy, from what it attends with: its own scale, the temperature of evaluations, and the cap.
    batch = {"tokens": jnp.concatenate([tokens, tokens[:, :1]], axis=1)}
    found = jax.jit(make_evaluate(run))(state, batch, levers(run))["entropy"][0]
    query, key, _ = (x[:1] for x in seen[0])  # an eighth of the batch
    steps = attention.attention_steps(
        query,
        key,
        key,
        scale=model.blocks[0].attention.scale[...],
        temperature=0.5,
        logits_soft_cap=4.0,
        is_causal=True,
    )
    p = np.asarray(steps.weights[0], np.float64)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean(-1)
    # 16 terms of at most 1 / e a row, from weights with a relative error of 64 u for logits below 8 in size.
    np.testing.assert_allclose(found, entropy, rtol=0, atol=16 * 2 * 64 * UNIT)


def assert_singular_vectors_follow(before, after):
    """Those after a step are one power iteration on the new kernel from those before it."""
    name = "blocks/0/attention/query"
    kernel = np.asarray(named_leaves(after.parameters)[f"{name}/kernel"], np.float64)
    right = np.asarray(named_leaves(before.constants)[f"{name}/left"], np.float64) @ kernel
    right /= np.linalg.norm(right)
    left = kernel @ right
    # Products of 16 terms, twice, each within 16 u of its size, which is at most the spectral norm, then divided by it.
    expected = {"left": left / np.linalg.norm(left), "right": right}
    for side, vector in expected.items():
        found, old = (named_leaves(state.constants)[f"{name}/{side}"] for state in (after, before))
        assert not np.array_equal(found, old)
        np.testing.assert_allclose(found, vector, rtol=0, atol=64 * UNIT * np.linalg.cond(kernel))


def test_evaluations_have_a_temperature_of_their_own_and_training_does_not_see_it(tiny):
    run = tiny()
    same, other = (dataclasses.replace(run, evaluate_temperature=t) for t in (1.0, 0.25))
    evaluate = jax.jit(make_evaluate(run))
    batch = next(training_batches(run))
    states = [started(each, steps=1)[1] for each in (run, other)]
    jax.tree.map(np.testing.assert_array_equal, *(state.parameters for state in states))
    losses = [float(evaluate(states[0], batch, levers(each))["loss"]) for each in (run, same, other)]
    assert losses[0] == losses[1] != losses[2]


def test_yarn_and_adaptive_temperature_sharpen(tiny):
    run = tiny(scale=0.25)
    stretched = levers(dataclasses.replace(run, stretch=16.0))
    factor = attention.yarn_factor(16.0)
    np.testing.assert_allclose(levers(run).temperature / stretched.temperature, factor, rtol=2 * UNIT)
    _, state, _ = started(run)
    batch = next(training_batches(run))
    entropy = jax.jit(make_evaluate(run))(state, batch, levers(run))["entropy"]
    sharper = jax.jit(make_evaluate(dataclasses.replace(run, adaptive=True)))(state, batch, levers(run))["entropy"]
    assert np.all(sharper < entropy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluate_temperature": 0.0}, "evaluate_temperature is 0.0"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0"),
        ({"stretch": 0.5}, "stretch is 0.5"),
        ({"model": {"scale_rule": "ssmax", "context": 1}}, "training_length is 1"),
        ({"data": {"task": "mqar"}}, "data.pairs is 8: expected from 1 to"),
    ],
)
def test_what_no_run_can_have_is_refused(tiny, fields, message):
    with pytest.raises(ValueError, match=message):
        make_init(tiny(**fields))


def test_numbers_of_a_sweep_are_traced_and_yet_told_apart(tiny, monkeypatch):
    """A task swept over three traced numbers: one trace with a cap, one without, and a row for each of their values."""
    traces = []
    monkeypatch.setattr(programs, "make_step", lambda run: traces.append(run.soft_cap) or make_step(run))
    monkeypatch.setattr(programs, "make_evaluate", lambda run: chex.assert_max_traces(make_evaluate(run), n=2))
    chex.clear_trace_counter()
    run = tiny(steps=4, evaluate_every=2, data={"task": "induction", "symbols": 4})
    axes = product(soft_cap=[None, 2.0, 4.0], evaluate_temperature=[0.5, 2.0], temperature=[1.0, 2.0])
    plan = make_plan(Sweep(base=run, axes=axes), preset="", description="", command="")
    execute(plan, Console(quiet=True))
    assert traces == [None, 1.0]
    results = load_results(plan.folder)
    assert len(results["points"]) == 12
    assert sorted(program["label"] for program in results["programs"].values()) == sorted(
        f"Exact(), soft_cap={cap}, evaluate_temperature={t}" for cap in (None, 2.0, 4.0) for t in (0.5, 2.0)
    )
    assert len({tuple(point["losses"]) for point in results["points"]}) == 6  # training sees cap and temperature
    assert len({point["evaluations"][-1]["loss"] for point in results["points"]}) == 12
    monkeypatch.setattr(report, "FIGURES", {})  # the tables are asked about
    page = report.write_report(plan.folder, results).read_text()
    assert "accuracy" in page
    assert "nats / token" in page
    assert "bits" not in page.split("<h2>In short</h2>")[1].split("</table>")[0]
