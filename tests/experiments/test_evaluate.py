"""Evaluation with other methods, and the errors that methods would make on a model's own operands."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import attention
from experiments.data import validation_batches
from experiments.evaluate import OWN, Options, evaluated, main
from experiments.files import read_json_lines
from experiments.levers import evaluation_numbers, levers
from experiments.metrics import SHARE
from experiments.saved import load
from experiments.steps import TrainState, make_evaluate, model_graph


@pytest.fixture(scope="module")
def rows(reference):
    folder = reference.folder / reference.name
    options = Options(folder=folder, methods=("TopK(k=64)", "TopK(k=2)"), temperatures=(1.0, 2.0), batches=2)
    return {(row["method"], row["temperature"]): row for row in evaluated(options)}


def test_a_run_as_it_was_trained_has_the_loss_that_its_log_has(reference, rows):
    last = read_json_lines(reference.folder / reference.name / "metrics.jsonl")[-1]
    row = rows[OWN, 1.0]
    # The same sums in a program that returns less: each of B T losses may round differently, by its own roundoff.
    assert row["loss"] == pytest.approx(last["validation_loss"], rel=64 * 2.0**-24)
    assert row["change"] == 0


def test_an_exact_method_changes_nothing_and_a_crude_one_something(rows):
    exact, crude = (rows[repr(attention.TopK(k=k)), 1.0] for k in (64, 2))
    assert abs(exact["change"]) <= 64 * 2.0**-24 * exact["loss"]
    assert abs(crude["change"]) > 1e-4
    assert rows[OWN, 2.0]["loss"] != rows[OWN, 1.0]["loss"]


def test_results_are_not_replaced_unasked(reference, tmp_path, capsys):
    arguments = [str(reference.folder / reference.name), "--temperatures", "1", "--batches", "1"]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"results.json", "evaluate.svg", "evaluate.png"}
    before = (out / "results.json").read_bytes()
    assert str(reference.folder) not in before.decode()
    assert main([*arguments, "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--out", str(out), "--overwrite"]) == 0
    assert (out / "results.json").read_bytes() == before
    assert len(json.loads(before)["rows"]) == 1


@pytest.mark.parametrize(
    ("option", "named"), [(("--temperatures", "0"), "temperatures"), (("--methods", "Tpk"), "topk")]
)
def test_wrong_options_are_named(reference, option, named, capsys, tmp_path):
    folder = str(reference.folder / reference.name)
    assert main([folder, "--out", str(tmp_path / "out"), "--batches", "1", *option]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_probes_measure_the_error_on_the_models_own_operands(reference):
    """Against `attention` called layer by layer on what the model attended with."""
    saved, method = load(reference.folder / reference.name), attention.TopK(k=4)
    run = dataclasses.replace(saved.run, probes=(repr(method),))
    batch, numbers = validation_batches(run)[0], levers(run)
    state = TrainState(saved.parameters, saved.constants, None, np.int32(0))
    found = jax.jit(make_evaluate(run))(state, batch, numbers)
    model = nnx.merge(model_graph(run), saved.parameters, saved.constants)
    arguments = evaluation_numbers(run, numbers)
    _, (layer,) = jax.jit(lambda tokens: model.observed(tokens, **arguments))(batch["tokens"][:, :-1])
    operands = [np.asarray(x[: -(-len(x) // SHARE)]) for x in layer]
    output, certificate = attention.certified_attention(*operands, method=method, is_causal=True, **arguments)
    exact = np.asarray(attention.dot_product_attention(*operands, is_causal=True, **arguments), np.float64)
    sizes = np.sqrt((exact**2).sum(-1).mean((0, 1)))
    error = np.sqrt(((np.asarray(output, np.float64) - exact) ** 2).sum(-1).mean((0, 1))) / sizes
    # Float32 errors of output and exact output are a few units of roundoff of outputs of this size.
    np.testing.assert_allclose(found[f"error of {method!r}"][0], error, atol=64 * 2.0**-24)
    bound = found[f"bound of {method!r}"][0]
    assert np.all(bound >= error)
    assert np.all(bound <= np.sqrt(np.square(certificate.error_bound).mean((0, 1))) / sizes * (1 + 2.0**-16))
