import dataclasses

import pytest

import attention
from experiments.axes import axis, either, parse_axis, product, zipped
from experiments.config import Run
from experiments.paths import look_up, paths, replaced
from experiments.points import TRACED, applied, point_id, static_part


def test_product_runs_through_every_combination_with_the_last_axis_fastest():
    axes = product(scale=[0.5, 1.0], temperature=[1, 2, 4])
    assert axes.names == ("scale", "temperature")
    assert [tuple(point.values()) for point in axes.points] == [
        (0.5, 1.0),
        (0.5, 2.0),
        (0.5, 4.0),
        (1.0, 1.0),
        (1.0, 2.0),
        (1.0, 4.0),
    ]
    assert axes.values("temperature") == [1.0, 2.0, 4.0]


def test_zips_and_products_compose():
    pairs = zipped(axis("optimizer.learning_rate", [1e-3, 1e-2]), steps=[100, 50])
    axes = product(pairs, seed=[0, 1])
    assert axes.names == ("optimizer.learning_rate", "steps", "seed")
    assert [tuple(point.values()) for point in axes.points] == [
        (1e-3, 100, 0),
        (1e-3, 100, 1),
        (1e-2, 50, 0),
        (1e-2, 50, 1),
    ]


def test_either_has_the_points_of_all_parts_in_turn():
    axes = either(product(temperature=[1.0, 2.0], seed=[0]), product(temperature=[2.0], seed=[1]))
    assert [tuple(point.values()) for point in axes.points] == [(1.0, 0), (2.0, 0), (2.0, 1)]
    assert axes.values("seed") == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: product(temprature=[1.0]), r"unknown axis 'temprature': did you mean 'temperature'"),
        (lambda: axis("optimizer.learning_rat", [1.0]), r"did you mean 'optimizer.learning_rate'"),
        (lambda: axis("name", ["a"]), r"unknown axis 'name'"),
        (lambda: product(attention=["exakt"]), r"unknown method 'exakt': did you mean 'exact'"),
        (lambda: product(temperature=[]), r"axis 'temperature' has no values"),
        (lambda: product(temperature=[1, 1.0]), r"takes 1.0 twice"),
        (lambda: product(temperature=["hot"]), r"axis 'temperature' takes 'hot': expected float"),
        (lambda: product(seed=[True]), r"axis 'seed' takes True: expected int"),
        (lambda: axis("model.positions", ["rotatory"]), r"takes 'rotatory'"),
        (lambda: product(product(seed=[0]), seed=[1]), r"axis 'seed' is named twice"),
        (lambda: zipped(seed=[0, 1], scale=[1.0]), r"different lengths: \{'seed': 2, 'scale': 1\}"),
        (lambda: either(product(seed=[0]), product(scale=[1.0])), r"\[\('seed',\), \('scale',\)\]; expected the same"),
        (lambda: product(), r"no axes"),
        (lambda: parse_axis("temperature"), r"expected NAME=VALUE,VALUE"),
        (lambda: parse_axis("temperature=1,,2"), r"expected NAME=VALUE,VALUE"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_axes_are_read_from_text():
    assert parse_axis("temperature=0.5,1").points == ({"temperature": 0.5}, {"temperature": 1.0})
    assert parse_axis("attention=Exact").points == ({"attention": attention.Exact()},)
    assert parse_axis("model.positions=rotary,learned").values("model.positions") == ["rotary", "learned"]
    assert parse_axis("scale=None,0.5").values("scale") == [None, 0.5]


def test_every_path_of_a_run_can_be_read_and_set():
    for name in paths(Run()):
        value = look_up(Run(), name)
        assert replaced(Run(), name, value) == Run()
    run = applied(Run(), {"optimizer.learning_rate": 0.5, "model.layers": 3})
    assert (run.optimizer.learning_rate, run.model.layers) == (0.5, 3)
    assert dataclasses.replace(run, optimizer=Run().optimizer, model=Run().model) == Run()


def test_runs_that_differ_in_traced_fields_alone_share_a_program():
    moved = Run(scale=0.3, temperature=4.0, seed=7, name="elsewhere")
    assert set(TRACED) <= set(paths(Run()))
    assert static_part(moved) == static_part(Run())
    assert static_part(Run(steps=7)) != static_part(Run())


def test_identifiers_tell_configurations_apart_and_ignore_the_place():
    point = {"attention": attention.Exact(), "temperature": 0.5}
    run = applied(Run(), point)
    name = point_id(run, point)
    assert name.startswith("exact-temperature=0.5-")
    assert name == point_id(dataclasses.replace(run, name="elsewhere"), point)
    assert name != point_id(dataclasses.replace(run, steps=run.steps + 1), point)
