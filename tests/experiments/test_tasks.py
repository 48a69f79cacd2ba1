"""Every task against a brute-force solver that reads only what stands before an answer."""

import dataclasses
import statistics

import numpy as np
import pytest

from experiments.data import training_batches, training_dataset, validation_batches
from experiments.files import read_json_lines
from experiments.tasks import TASKS, Copy, Induction, ListOps, Mqar
from experiments.tasks.listops import WORDS
from experiments.train import train


def drawn(task, rows=200, seed=0):
    return task.draw(np.random.default_rng(seed), rows)


def questions(examples):
    """For each prediction that counts: what stands before it, and the answer."""
    for tokens, counts in zip(examples.tokens.tolist(), examples.counts, strict=True):
        for t in np.flatnonzero(counts):
            yield tokens[: t + 1], tokens[t + 1]


def solve_mqar(task, before):
    *pairs, key = before
    return next(pairs[i + 1] for i in range(0, 2 * task.pairs, 2) if pairs[i] == key)


def solve_copy(task, before):
    separator = before.index(task.symbols)
    return before[len(before) - separator - 1]


def solve_induction(task, before):
    assert before.count(task.symbols) == 2
    assert before[-1] == task.symbols
    return before[before.index(task.symbols) + 1]


def solve_listops(task, before):
    """By rewriting innermost brackets in the text until a digit is left."""
    words = [WORDS[token] for token in before]
    assert words.pop() == "="
    functions = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(statistics.median(x)), "[SM": lambda x: sum(x) % 10}
    while "]" in words:
        end = words.index("]")
        start = max(i for i in range(end) if words[i].startswith("["))
        words[start : end + 1] = [str(functions[words[start]]([int(word) for word in words[start + 1 : end]]))]
    return int(words[0])


CASES = [
    (Mqar(context=64, pairs=4, symbols=64), solve_mqar, 4),
    (Mqar(context=7, pairs=2, symbols=5), solve_mqar, 2),
    (Copy(context=16, symbols=5), solve_copy, 8),
    (Copy(context=17, symbols=5), solve_copy, 8),
    (Induction(context=12, symbols=3), solve_induction, 1),
    (Induction(context=3, symbols=2), solve_induction, 1),
    (ListOps(context=40, depth=3), solve_listops, 1),
    (ListOps(context=5, depth=2), solve_listops, 1),
]


@pytest.mark.parametrize(("task", "solve", "answers"), CASES, ids=lambda x: type(x).__name__)
def test_a_brute_force_solver_finds_every_answer(task, solve, answers):
    examples = drawn(task)
    assert examples.tokens.shape == (200, task.context + 1)
    assert examples.tokens.dtype == np.uint16
    assert examples.tokens.max() < task.vocabulary
    np.testing.assert_array_equal(examples.counts.sum(1), answers)
    found = [(solve(task, before), answer) for before, answer in questions(examples)]
    assert [guess for guess, _ in found] == [answer for _, answer in found]
    assert len({answer for _, answer in found}) > 1


def test_keys_and_values_of_mqar_are_apart_and_each_key_is_asked_for_once():
    task = Mqar(context=64, pairs=4, symbols=64)
    for tokens in drawn(task).tokens.tolist():
        keys, values = tokens[0:8:2], tokens[1:8:2]
        assert len(set(keys)) == 4
        assert max(keys) < 32 <= min(values)
        assert sorted(token for token in tokens[8:] if token < 32) == sorted(keys)


def test_questions_of_mqar_follow_the_power_law():
    """With one pair, slot i of 8 has probability i^(a - 1) / sum j^(a - 1)."""
    counts = drawn(Mqar(context=17, pairs=1, symbols=2), rows=20_000).counts
    expected = np.arange(1, 9) ** (0.01 - 1.0)
    expected /= expected.sum()
    found = counts[:, 2::2].mean(0)
    # Five standard deviations of a share of 20,000.
    assert np.all(abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / 20_000))


def test_listops_nests_to_its_depth_and_uses_every_operator():
    texts = [[WORDS[token] for token in tokens] for tokens in drawn(ListOps(context=60, depth=3)).tokens]
    depths = [
        max(sum(w.startswith("[") for w in text[:i]) - text[:i].count("]") for i in range(len(text))) for text in texts
    ]
    assert set(depths) == {1, 2, 3}
    assert {word for text in texts for word in text} == set(WORDS)


BAD = [
    (Mqar, {"context": 64, "pairs": 17}, "data.pairs is 17: expected from 1 to"),
    (Mqar, {"context": 64, "symbols": 15}, "data.symbols is 15: expected at least 2 data.pairs = 16"),
    (Copy, {"context": 1}, "model.context is 1: expected at least 2"),
    (Induction, {"context": 2}, "model.context is 2: expected at least 3"),
    (Induction, {"context": 8, "symbols": 0}, "data.symbols is 0"),
    (ListOps, {"context": 4}, "model.context is 4: expected at least 5"),
    (ListOps, {"context": 40, "depth": 0}, "data.depth is 0"),
]


@pytest.mark.parametrize(("task", "fields", "message"), BAD)
def test_what_cannot_be_drawn_is_refused(task, fields, message):
    with pytest.raises(ValueError, match=message):
        task(**fields)


# In the trainer.


@pytest.mark.parametrize("name", TASKS)
def test_batches_depend_on_seed_and_index_alone(tiny, name):
    run = tiny(data={"task": name, "source": "no/such/text", "pairs": 2})
    dataset, batches = training_dataset(run), training_batches(run)
    for _ in range(3):
        next(batches)
    position = batches.get_state()
    fourth = next(batches)
    np.testing.assert_equal(dataset[3], fourth)
    resumed = training_batches(run)
    resumed.set_state(position)
    np.testing.assert_equal(next(resumed), fourth)
    other = dataclasses.replace(run, seed=1)
    assert not np.array_equal(training_dataset(other)[3]["tokens"], fourth["tokens"])
    held_out = validation_batches(run)
    np.testing.assert_equal(held_out, validation_batches(other))
    assert not any(np.array_equal(dataset[i]["tokens"], held_out[i]["tokens"]) for i in range(2))


def test_a_task_is_learnt_and_its_accuracy_reported(tiny):
    """A copy of one symbol from two places back is a matter of one head; chance is 1/2."""
    run = tiny(
        steps=60,
        evaluate_every=30,
        model={"context": 2},
        data={"task": "copy", "symbols": 2, "batch": 16},
    )
    result = train(run)
    assert "bits_per_byte" not in result
    assert result["accuracy"] == 1
    assert result["validation_loss"] < 0.1
    records = read_json_lines(run.folder / run.name / "metrics.jsonl")
    assert [record["accuracy"] for record in records if "accuracy" in record][-1] == 1
    assert np.isclose(records[0]["loss"], np.log(4), rtol=0.02)  # of 4 tokens, none known
