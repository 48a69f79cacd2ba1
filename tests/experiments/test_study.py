"""Every study from its command line, in its small form, and what its numbers mean."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest

from configs.studies import length_beta, lr_x_scale, mqar_recall, sinks
from experiments.studies import load_study, study_names, summarised
from experiments.study import main
from experiments.study_figures import best


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs the small form of a study, once; the folder of its results."""
    folder = tmp_path_factory.mktemp("studies")

    @functools.cache
    def run(name):
        assert main([name, "--smoke", "--folder", str(folder)]) == 0
        return folder / f"{name}-smoke" / "study"

    return run


# Those that compile most are run by the campaign.
LONGER = ("length_beta", "temp_crossover")
SMALL = [pytest.param(x, marks=[pytest.mark.campaign] if x in LONGER else []) for x in study_names()]


@pytest.mark.parametrize("name", SMALL)
def test_the_small_form_runs(name, finished):
    out = finished(name)
    assert {path.name for path in out.iterdir()} == {"results.json", "page.html", f"{name}.svg", f"{name}.png"}
    before = (out / "results.json").read_bytes()
    record = json.loads(before)
    assert record["summary"] == summarised(record["rows"])
    assert all(row["numbers"] for row in record["rows"])
    assert str(out.parents[1]) not in before.decode() + (out / "page.html").read_text()


@pytest.mark.parametrize("name", ["sinks", "train_T_x_eval_T"])  # a sweep, and runs with checkpoints
def test_a_finished_point_is_not_trained_again(name, finished, monkeypatch):
    out = finished(name)
    before = (out / "results.json").read_bytes()

    def refused(*_, **__):
        raise AssertionError("a finished point was trained again")

    monkeypatch.setattr("experiments.campaign.train_together", refused)
    monkeypatch.setattr("experiments.train._Session.loop", refused)
    assert main([name, "--smoke", "--folder", str(out.parents[1])]) == 0
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("name", study_names())
def test_a_study_says_what_it_asks_how_to_run_it_and_what_is_expected(name):
    study, description = load_study(name)
    assert description.splitlines()[0].endswith("?")
    assert f"python -m experiments.study {name}" in description
    for word in ("Axes", "Metric: ", "Expected: ", "It takes ", "arXiv "):
        assert word in description
    if study.sweep is not None:
        assert len(study.sweep.axes.values("seed")) >= 3


def test_an_unknown_study_is_named(capsys):
    assert main(["sink"]) == 2
    assert "unknown study 'sink': did you mean 'sinks'" in capsys.readouterr().err


def test_recall_by_elimination_is_counted_as_guessing():
    """Of two values from two symbols the first is right in 3/4: both alike half of the time, else either; the last one
    always. Of four from eight 5,000 sequences are drawn: shares in [0, 1] deviate by at most 1/2, their mean by 0.0071,
    and three times that is allowed.
    """
    assert mqar_recall.guessed(2, 2) == (3 / 4 + 1) / 2
    rng = np.random.default_rng(0)
    right = []
    for values in rng.integers(8, size=(5000, 4)):
        left = list(rng.permutation(values))
        while left:
            frequent = max(set(left), key=left.count)
            right.append(left.pop() == frequent)
    assert abs(np.mean(right) - mqar_recall.guessed(4, 8)) < 3 * 0.0071


def row(axes, seed, **numbers):
    return {"axes": axes, "seed": seed, "numbers": numbers}


def test_a_summary_has_mean_extremes_and_deviation_of_the_seeds_and_none_where_one_is_missing():
    rows = [row({"a": 1}, 0, x=1.0), row({"a": 2}, 0, x=5.0), row({"a": 1}, 1, x=4.0), row({"a": 2}, 1, x=None)]
    first, second = summarised(rows)
    assert first["axes"] == {"a": 1}
    assert first["seeds"] == 2
    assert first["numbers"]["x"] == {"mean": 2.5, "low": 1.0, "high": 4.0, "deviation": math.sqrt(4.5)}
    assert second["numbers"]["x"] == dict.fromkeys(("mean", "low", "high", "deviation"))


def test_the_best_row_is_that_of_the_highest_mean_and_never_a_missing_one():
    means = {1e-3: 0.2, 1e-2: None, 1e-1: 0.7, 1.0: 0.1}
    rows = [{"axes": {"m": "a", "rate": rate}, "numbers": {"x": {"mean": mean}}} for rate, mean in means.items()]
    assert best(rows, "rate", "x") == [{"axes": {"m": "a"}, "numbers": {"x": {"mean": 0.7}}}]
    assert best(rows[1:2] + rows[:1], "rate", "x")[0]["numbers"]["x"]["mean"] == 0.2


@pytest.mark.parametrize("keys", [10, 1000])
def test_largest_weights_are_those_of_the_formula(keys):
    """A weight of 1 / (1 + (n - 1) e^-gap), with a gap of 5 for softmax and of 0.43 ln n 5 for SSMax."""
    found = length_beta.largest_weights(keys)
    for name, gap in (("softmax", 5.0), ("SSMax", 0.43 * math.log(keys) * 5)):
        # Logits of up to 3 * 0.43 ln n, rounded, move p by as much as its exponent; the sum of n weights by n units.
        rounding = (2 * gap + keys + 8) * 2.0**-24
        assert found[name] == pytest.approx(1 / (1 + (keys - 1) * math.exp(-gap)), rel=rounding)


def test_uniform_weights_put_their_mean_on_the_first_token():
    weights = np.tril(np.ones((64, 64)))
    weights /= weights.sum(1, keepdims=True)
    assert sinks.uniform(64) == pytest.approx(weights[:, 0].mean(), rel=1e-14)


def test_every_rule_that_is_trained_has_a_name_of_its_own():
    names = [lr_x_scale._rule({"axes": axes}) for axes in lr_x_scale.RULES.points]
    assert len(set(names)) == len(names) == 8
    assert names[0] == "1/sqrt(H)"
    assert names[-3:] == ["1/sqrt(H), soft cap 15", "1/sqrt(H), sigma-reparametrised", "1/sqrt(H), gated"]


def test_sensitivity_is_the_mean_loss_above_the_lowest_with_divergence_as_untrained():
    def point(rate, last, diverged=None):
        axes = lr_x_scale.PLAIN | {"model.scale_rule": "1/H"}
        evaluations = [{"loss": 5.0}, {"loss": last}]
        return {"axes": axes, "seed": 0, "learning_rate": rate, "evaluations": evaluations, "diverged_at": diverged}

    @dataclasses.dataclass
    class Trained:
        points: list

        def swept(self):
            return {"points": self.points}

    rows = lr_x_scale.measure(Trained([point(1e-3, 2.0), point(1e-2, 3.0), point(1e-1, 9.0), point(1.0, 2.5, 3)]))
    assert [r["numbers"]["loss"] for r in rows[:4]] == [2.0, 3.0, 5.0, 5.0]
    assert [r["numbers"]["diverged"] for r in rows[:4]] == [0, 0, 0, 1]
    assert rows[4] == row({"rule": "1/H"}, 0, sensitivity=(0 + 1 + 3 + 3) / 4, **{"lowest loss": 2.0})
