"""The benchmark runs end to end, races every contestant on the same problem, and writes whole files."""

import functools
import json

import jax
import numpy as np
import pytest

import attention
from experiments import benchmark, certified, probe_cost, side_by_side, temperature, throughput
from experiments.axes import product
from experiments.config import Model
from experiments.contestants import Cell, jax_nn, ours
from experiments.linear import crossover
from experiments.operand_families import FAMILIES
from experiments.operand_files import Layer, save
from experiments.presets import Sweep
from experiments.studies import SMALL as SMALL_RUN
from experiments.timing import interleaved, ratios

# The second compiles most.
SMALL = [["exact"], pytest.param(["tiles", "--sizes", "8", "16"], marks=pytest.mark.campaign), ["fused"]]


@pytest.mark.parametrize("command", SMALL)
def test_a_small_benchmark_writes_numbers_and_figures(command, tmp_path, capsys):
    options = "--lengths 16 33 --heads 1 --head-sizes 8 --rounds 2 --directions forward --causal False"
    benchmark.main([*command, *options.split(), "--out", str(tmp_path / "found")])
    name = command[0]
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"results.json", f"{name}.svg", f"{name}.png"}
    record = json.loads((tmp_path / "found" / "results.json").read_text())
    assert [cell["cell"]["length"] for cell in record["cells"]] == [16, 33]
    for cell in record["cells"]:
        assert set(cell["seconds"]) == set(cell["gigaflops"]) == set(cell["temporaries"])
        for ratio in cell["slower_than_ours"].values():
            assert 0 < ratio["lower_quartile"] <= ratio["median"] <= ratio["upper_quartile"]
    assert record["environment"]["versions"]["jax"]
    assert str(tmp_path) not in json.dumps(record)  # a committed result names no folder of one machine
    assert "forward" in capsys.readouterr().out


def test_decoding_and_memory_are_measured(tmp_path, capsys):
    benchmark.main(["decode", "--lengths", "32", "--rounds", "2", "--out", str(tmp_path / "decode")])
    benchmark.main(["memory", "--lengths", "32", "64", "--out", str(tmp_path / "memory")])
    decode, memory = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("decode", "memory"))
    assert decode["cells"][0]["cell"]["queries"] == 1
    *plans, chunked, fused = memory["cells"]
    assert len(plans) == 2 * 2 * 2
    assert all(set(plan["temporaries"]) == {"Chunked", "Fused", "jax.nn"} for plan in plans)
    assert [run["method"] for run in (chunked, fused)] == ["Chunked", "Fused"]
    for run in (chunked, fused):
        assert run["finite"]
        assert run["cell"]["length"] == 64
        assert run["peak_bytes"] > 2**20
    assert "temporaries" in capsys.readouterr().out


def test_random_features_are_measured_beside_their_closed_forms(tmp_path, capsys):
    """The standard error of a variance from 400 draws is 7%, more where tails are heavy: 2 is beyond it."""
    axes = "--kinds data_dependent --couplings iid --numbers 16 --temperatures 8 --head-size 4 --pairs 3"
    benchmark.main(["features", *axes.split(), "--out", str(tmp_path / "features")])
    (cell,) = json.loads((tmp_path / "features" / "results.json").read_text())["cells"]
    assert cell["testable"]
    assert 0.5 <= (cell["error"] / cell["closed_form"]) ** 2 <= 2
    assert (tmp_path / "features" / "features.png").exists()
    assert "closed form" in capsys.readouterr().out


@pytest.fixture
def captured(tmp_path):
    """A file of the operands of two layers."""
    path = tmp_path / "elsewhere" / "run.safetensors"
    draw = np.random.default_rng(0).standard_normal((2, 3, 1, 128, 1, 8))
    layers = [Layer(query=q, key=k, value=v, beta=np.full(1, 8**-0.5)) for q, k, v in draw]
    save(path, layers, "a run")
    return str(path)


@pytest.mark.campaign
def test_certificates_are_measured(tmp_path, captured, capsys):
    options = "--lengths 32 --tokens 128 --heads 1 --head-size 8 --temperatures 1 8 --tolerances 0.01 --bounds ball"
    command = ["certified", *options.split(), "--operands", captured, "--rounds", "1", "--out", str(tmp_path / "c")]
    benchmark.main(command)
    cells = json.loads((tmp_path / "c" / "results.json").read_text())["cells"]
    looked_at, races = [x for x in cells if "family" in x], [x for x in cells if "label" in x]
    assert len(looked_at) == (len(FAMILIES) + 2) * 2 * 2
    assert {x["causal"] for x in looked_at} == {False, True}
    assert looked_at[-1]["family"] == "a run, layer 1"
    assert len(races) == len(certified.RACES)
    for cell in looked_at:
        assert cell["violations"] == 0
        assert 0 <= cell["oracle"] <= 1
        assert 0 <= cell["read"] <= 1
        assert len(cell["read_by_head"]) == cell["heads"]
    for race in races:
        assert race["largest_error"] <= race["largest_bound"]
        assert set(race["seconds"]) == {"Certified", "Chunked", "Fused"}
        assert race["fused_slower_than_certified"]["median"] > 0
    files = {"results.json", *(f"{x}.{kind}" for x in ("certified", "looseness", "races") for kind in ("svg", "png"))}
    assert {path.name for path in (tmp_path / "c").iterdir()} == files
    assert "coherent" in capsys.readouterr().out


def test_all_heads_of_a_captured_layer_are_looked_at():
    """Four heads that share two of the keys: the third reads the second."""
    query, key = np.arange(4.0)[None, None, :, None] + np.zeros((2, 9, 1, 3)), np.zeros((2, 9, 2, 3))
    key[:, :, 1] = 1
    found = list(certified.heads(Layer(query=query, key=key, value=2 * key, beta=np.ones(4)), 5))
    assert [(x[0, 0, 0, 0], k[0, 0, 0, 0], v[0, 0, 0, 0]) for x, k, v in found] == [
        (0, 0, 0),
        (1, 0, 0),
        (2, 1, 2),
        (3, 1, 2),
    ]
    assert {x.shape for head in found for x in head} == {(1, 5, 1, 3)}


def test_hard_families_are_what_they_are_called():
    sizes = (512, 1, 16, False)
    draw = {name: FAMILIES[name](np.random.default_rng(0), *sizes) for name in FAMILIES}
    assert len(np.unique(draw["duplicated keys"][1][0, :, 0], axis=0)) <= 16
    lengths = np.sort(np.linalg.norm(draw["one huge key"][1], axis=-1).ravel())
    assert lengths[-1] > 5 * lengths[-2]
    query, key, value = (x[0, :, 0] for x in draw["huge values unseen"])
    huge = np.linalg.norm(value, axis=-1) > 100
    assert huge.sum() == 64
    assert np.max(query @ key[huge].T) < 0 < np.min(query @ key[~huge].T)


@pytest.mark.campaign
def test_growth_and_crossover_of_linear_attention_are_measured(tmp_path, capsys):
    options = "--lengths 16 48 --features 4 8 --heads 1 --head-size 8 --rounds 1 --growth-from 1 --positions 5 9"
    benchmark.main(["linear", *options.split(), "--exact-up-to", "16", "--out", str(tmp_path / "linear")])
    *cells, decoding, found = json.loads((tmp_path / "linear" / "results.json").read_text())["cells"]
    assert [("Chunked" in cell["seconds"]) for cell in cells] == [True, False] * 2
    assert set(decoding["seconds"]) == {"5", "9"}
    assert all(set(growth) == {"Performer, M = 4", "Performer, M = 8"} for growth in found["growth"].values())
    assert "growth" in capsys.readouterr().out
    # On logarithmic axes the ratio 4 falls to 1 / 4 half way from 1 to 16.
    assert crossover([(1, 4.0), (16, 16.0)], [(1, 1.0), (16, 64.0)]) == pytest.approx(4.0)
    assert crossover([(1, 1.0), (16, 1.0)], [(1, 2.0), (16, 2.0)]) is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_contestants_answer_the_same_question(gradient, causal):
    cell = Cell(length=20, gradient=gradient, causal=causal, heads=2, head_size=8)
    mine, theirs = (contestant.call() for contestant in (ours(cell, attention.Chunked()), jax_nn(cell)))
    for a, b in zip(mine, theirs, strict=True):
        # Both within 1e-5 of exact: 20 keys, logits of order one, 2**-24 each.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_contestants_take_turns():
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, limit=60.0)
    assert order == [*"abab", *"aabb", *"bbaa"]  # what is timed is the second of each pair
    assert [len(times) for times in seconds.values()] == [2, 2]
    assert ratios({"a": [1.0, 2.0], "b": [3.0, 6.0]}, of="a")["b"]["median"] == 3.0


def test_help_names_every_benchmark_and_option(capsys):
    for arguments, words in (
        (["--help"], ("exact", "tiles")),
        (["exact", "--help"], ("--lengths", "--rounds", "--out")),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)


def test_impossible_lengths_end_with_a_message():
    with pytest.raises(SystemExit, match="expected numbers of at least 1"):
        benchmark.main(["exact", "--lengths", "0"])


def test_a_trainers_speed_is_measured(tmp_path):
    small = (
        "--model.layers 1 --model.width 16 --model.heads 2 --model.kv-heads 2 --model.mlp-width 16 --model.context 16"
    )
    out = tmp_path / "throughput"
    benchmark.main(
        ["throughput", *small.split(), "--batch", "2", "--methods", "Exact", "--rounds", "3", "--out", str(out)]
    )
    ours, *theirs = json.loads((out / "results.json").read_text())["cells"]
    assert ours["contestant"] == "Exact()"
    assert ours["tokens_per_second"]["median"] == pytest.approx(2 * 16 / ours["seconds"]["median"])
    # The definition: of each layer 7 products of N H T (T + 1) / 2 with tiles, and 3 of every weight.
    tiles, weights = 7 * 16 * 16 * 17 / 2, 3 * 16 * (4 * 16**2 + 3 * 16**2 + 16 * 256)
    assert ours["attention_share_of_operations"] == pytest.approx(tiles / (tiles + weights))
    assert ours["share_without"]["median"] < 1
    for peer in theirs:  # the same model: what it loses before and after a step is the same
        np.testing.assert_allclose(peer["losses"], ours["losses"], rtol=1e-4)


def test_shares_of_attention_are_of_the_same_rounds():
    """Two layers of 0.06 s in a step of 0.4 s are 0.3 of it; if 0.3 s are left without attention, it takes 0.25."""
    seconds = {"x": [0.4, 0.8], "attention of x": [0.06, 0.12], throughput.LEFT_OUT: [0.3, 0.6]}
    assert throughput.share_alone(seconds, "x", 2)["median"] == pytest.approx(0.3, rel=1e-12)
    assert throughput.share_without(seconds, "x")["median"] == pytest.approx(0.25, rel=1e-12)


def test_certificates_are_counted_and_compared_with_errors_that_are_there():
    """Of four rows with errors 0, 1, 1, 2 and bounds 0.5, 2, 3, 4: ratios 2, 3, 2; radius 10, 0.1 of it is 1."""
    error = np.zeros((1, 4, 1, 3))
    error[0, :, 0, 1] = 0, 1, -1, 2
    bounds = np.array([0.5, 2, 3, 4], np.float32).reshape(1, 4, 1)
    found = temperature.certified([error, 0 * error], [(bounds, np.float32(0.5))] * 2, radius=10.0)
    assert found["bound_over_error"] == [2.0, None]
    assert found["rows_certified_to_0.1"] == [0.25, 0.25]
    assert found["rows_certified_to_0.01"] == [0.0, 0.0]
    assert found["bound_over_radius"] == [0.25, 0.25]
    assert found["share_of_keys_read"] == [0.5, 0.5]


def test_what_stands_for_attention_reads_queries_keys_and_values_and_is_no_choice():
    operands = np.random.default_rng(0).standard_normal((3, 1, 5, 2, 4)).astype(np.float32)
    call = functools.partial(attention.dot_product_attention, method=throughput.LeftOut(), is_causal=True)
    for gradient in jax.grad(lambda *x: call(*x).sum(), (0, 1, 2))(*operands):
        assert np.abs(gradient).min() > 0
    assert "leftout" not in attention.METHODS


def test_a_population_is_measured_against_a_loop(tmp_path, monkeypatch, capsys):
    sweep = Sweep(base=SMALL_RUN, axes=product(attention=["Exact", "TopK(k=2)"], temperature=[1.0, 2.0, 4.0]))
    monkeypatch.setattr(side_by_side, "preset_names", lambda: ["small"])
    monkeypatch.setattr(side_by_side, "load_preset", lambda name: (sweep, ""))
    options = "--sweeps small --members 3 8 --rounds 1"
    benchmark.main(["population", *options.split(), "--out", str(tmp_path)])
    (three,) = json.loads((tmp_path / "results.json").read_text())["cells"]  # a program has no 8 points
    assert (three["members"], three["attention"]) == (3, "Exact()")
    assert three["loop_over_vmap"]["median"] > 0
    assert three["temporary_bytes"]["vmap"] > three["temporary_bytes"]["loop"]
    assert "population.png" in capsys.readouterr().out


@pytest.mark.campaign
def test_what_probes_cost_is_measured(tmp_path, monkeypatch, capsys):
    model = Model(layers=1, width=16, heads=2, kv_heads=2, mlp_width=16, context=16)
    monkeypatch.setattr(probe_cost, "MODELS", {"small": (model, 8)})
    benchmark.main(["probes", "--models", "small", "--methods", "TopK(k=4)", "--rounds", "1", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert set(row["seconds"]) == {"step", "loss", "numbers", "probes"}
    assert all(times["median"] > 0 for times in row["seconds"].values())
    assert (tmp_path / "probes.png").exists()
    assert "small" in capsys.readouterr().out


def test_shares_of_probes_are_of_the_steps_between_two_evaluations(monkeypatch):
    """8 batches an evaluation, 50 steps between two: 8 (0.3 - 0.2) / (50 0.4) = 0.04 for the probes."""
    seconds = {"step": [0.4] * 3, "loss": [0.1] * 3, "numbers": [0.2] * 3, "probes": [0.3] * 3}
    monkeypatch.setattr(probe_cost, "_contestants", lambda run: {})
    monkeypatch.setattr(probe_cost, "interleaved", lambda *_: seconds)
    (row,) = probe_cost.Probes(models=("default",)).measured()
    assert row["share_of_probes"]["median"] == pytest.approx(0.04, rel=1e-12)
    assert row["share_of_numbers"]["median"] == pytest.approx(0.04, rel=1e-12)
    assert row["share_of_both"]["median"] == pytest.approx(0.08, rel=1e-12)


def test_every_registered_method_has_its_error_over_the_temperature(tmp_path, captured, monkeypatch, capsys):
    """A method is measured because it is registered; exact ones are what the others are measured against."""
    methods = {"linearelu": attention.LinearElu, "taylor": attention.Taylor, "exact": attention.Exact}
    monkeypatch.setattr(temperature, "METHODS", methods)
    options = "--lengths 48 --head-size 4 --temperatures 1 8 --budget 0.2 --steps 0 --by-layer --also"
    benchmark.main(["temperature", "--operands", captured, *options.split(), "--out", str(tmp_path)])
    results = (tmp_path / "results.json").read_text()
    assert str(tmp_path) not in results
    found, *layers = json.loads(results)["cells"]
    assert [layer["operands"] for layer in layers] == ["a run, layer 0", "a run, layer 1"]
    assert layers[0]["shape"] == [1, 128, 1, 8]
    assert layers[0]["methods"] != layers[1]["methods"]
    assert len(temperature.figure([found, *layers]).axes) == 3 * 2  # bounds below errors
    assert len(temperature.figure([found, *layers, found]).axes) == 2 * 3  # errors alone, two rows of three
    # Of 48 keys, order 1 with its 5 features takes 2 (48 + 48) 5 (4 + 1) of 4 48 48 4 operations; order 2 takes 15.
    assert 0 < found["entropy_over_log"][0] < found["entropy_over_log"][1] < 1
    assert list(found["methods"]) == ["LinearElu(chunk=128)", "Taylor(chunk=128, order=1)"]
    elu, taylor = found["methods"].values()
    assert taylor["share_of_exact_operations"] == 2 * 96 * 5 * 5 / (4 * 48 * 48 * 4)
    for row in (elu, taylor):
        assert row["relative_error"][1] < row["relative_error"][0]
    assert "bound_over_radius" not in elu
    for error, bound in zip(taylor["error_over_radius"], taylor["bound_over_radius"], strict=True):
        assert error <= bound
    assert "relative error" in capsys.readouterr().out
