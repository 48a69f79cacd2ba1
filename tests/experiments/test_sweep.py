import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import pytest
from rich.console import Console

import attention
from experiments import campaign, programs, report
from experiments.axes import axis, product
from experiments.campaign import execute, make_plan
from experiments.config import Data, Model, Optimizer, Run
from experiments.files import write_json
from experiments.population import train_together
from experiments.presets import Sweep, load_preset, preset_names
from experiments.report import load_results
from experiments.sweep import main, read_command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "be", "that", "is", "the", "question"], 4000)
    path.write_text(" ".join(words))
    return path


def tiny(text, folder, **changes):
    run = Run(
        name="tiny",
        folder=folder,
        steps=6,
        evaluate_every=3,
        evaluate_batches=2,
        model=Model(layers=1, width=8, heads=2, kv_heads=1, mlp_width=16, context=16),
        data=Data(source=str(text), batch=2),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=2),
    )
    return dataclasses.replace(run, **changes)


def run_sweep(base, axes, **options):
    plan = make_plan(Sweep(base=base, axes=axes), preset="tiny", description="", command="tiny", **options)
    execute(plan, Console(quiet=True))
    return load_results(plan.folder)


def without_timings(results):
    """What must not depend on when, or in how many pieces, a sweep ran."""
    strip = lambda record: {name: value for name, value in record.items() if name != "timings"}  # noqa: E731
    return {
        **strip(results),
        "programs": {name: strip(program) for name, program in results["programs"].items()},
        "points": [strip(point) for point in results["points"]],
    }


SQUARE = product(scale=[0.25, 0.5], temperature=[1.0, 2.0])


@pytest.fixture(scope="module")
def square(text, tmp_path_factory):
    return run_sweep(tiny(text, tmp_path_factory.mktemp("square")), SQUARE)


def test_equal_ratios_have_bitwise_equal_curves(square):
    curves = {(p["scale"], p["temperature"]): (p["losses"], p["evaluations"]) for p in square["points"]}
    assert curves[0.25, 1.0] == curves[0.5, 2.0]
    assert curves[0.25, 1.0] != curves[0.5, 1.0] != curves[0.25, 2.0]


def test_every_point_has_its_whole_curve(square):
    assert len(square["points"]) == 4
    for point in square["points"]:
        assert len(point["losses"]) == 6
        assert [evaluation["step"] for evaluation in point["evaluations"]] == [0, 3, 6]
        assert np.shape(point["evaluations"][-1]["entropy"]) == (1, 2)
        assert point["losses"][-1] < point["losses"][0]
        assert point["beta"] == point["scale"] / point["temperature"]


@pytest.mark.parametrize("population", ["loop", "vmap"])
def test_all_traced_axes_share_one_trace(population, text, tmp_path, monkeypatch):
    for name in ("make_init", "make_step", "make_evaluate"):
        make = getattr(programs, name)
        once = lambda run, make=make: chex.assert_max_traces(make(run), n=1)  # noqa: E731
        monkeypatch.setattr(programs, name, once)
    chex.clear_trace_counter()
    rates = axis("optimizer.learning_rate", [1e-3, 1e-2])
    axes = product(rates, scale=[0.25, 0.5], temperature=[1.0, 2.0], seed=[0, 1])
    results = run_sweep(tiny(text, tmp_path, steps=3), axes, population=population)
    assert (len(results["points"]), len(results["programs"])) == (16, 1)
    assert len({tuple(point["losses"]) for point in results["points"]}) == 12  # of 16, 4 share beta with another


def test_static_axes_are_programs_of_their_own(text, tmp_path):
    axes = product(axis("model.layers", [1, 2]), seed=[0, 1])
    results = run_sweep(tiny(text, tmp_path, steps=3), axes)
    assert [p["label"] for p in results["programs"].values()] == ["Exact(), model.layers=1", "Exact(), model.layers=2"]
    small, large = (program["parameters"] for program in results["programs"].values())
    assert small < large


def test_vmap_trains_what_the_loop_trains(square, text, tmp_path):
    """Batched products round in another order: relative differences of a few u = 2**-24 a step, after 6 steps far
    below 1e-4; another seed or another beta moves the loss by more than 1e-3 (asserted by the curves above).
    """
    vmapped = run_sweep(tiny(text, tmp_path), SQUARE, population="vmap", lanes=3)  # a full and a padded population
    for one, other in zip(square["points"], vmapped["points"], strict=True):
        assert one["axes"] == other["axes"]
        np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-4)


@pytest.mark.parametrize("population", ["loop", "vmap"])
def test_a_finished_point_is_never_run_again_and_a_missing_one_ends_the_same(population, text, tmp_path, monkeypatch):
    options = {"population": population, "lanes": 3}
    whole = run_sweep(tiny(text, tmp_path), SQUARE, **options)
    points = tmp_path / "tiny" / "points"
    (points / f"{whole['points'][1]['id']}.json").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in points.iterdir()}
    trained = []
    monkeypatch.setattr(campaign, "train_together", lambda *args: trained.extend(args[1]) or train_together(*args))
    again = run_sweep(tiny(text, tmp_path), SQUARE, **options)
    assert {(run.scale, run.temperature) for run in trained} == {(0.25, 2.0)}  # the missing one, in all lanes
    assert without_timings(again) == without_timings(whole)
    assert {name: (points / name).stat().st_mtime_ns for name in kept} == kept
    monkeypatch.setattr(campaign, "train_together", None)  # nothing is left that could call it
    assert without_timings(run_sweep(tiny(text, tmp_path), SQUARE, **options)) == without_timings(whole)


def command(text, folder, *more):
    """A tiny sweep as a process: `quickstart` with everything made small."""
    sizes = {"layers": 1, "width": 8, "heads": 2, "kv-heads": 1, "mlp-width": 16, "context": 16}
    model = [word for name, size in sizes.items() for word in (f"--model.{name}", str(size))]
    lengths = ["--data.batch", "2", "--steps", "40", "--evaluate-every", "20", "--evaluate-batches", "2"]
    axes = ["--axes", "scale=0.25,0.5", "temperature=1,2"]
    place = ["--data.source", str(text), "--folder", str(folder), "--name", "tiny"]
    return [sys.executable, "-m", "experiments.sweep", "quickstart", *model, *lengths, *place, *axes, *more]


KILLED_AFTER_A_POINT = """
import os, signal, sys
from experiments import store, sweep

finish = store.Store.finish

def finish_and_die(self, record):
    finish(self, record)
    os.kill(os.getpid(), signal.SIGKILL)

store.Store.finish = finish_and_die
sweep.main(sys.argv[1:])
"""


def test_a_killed_sweep_goes_on_and_ends_the_same(text, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", {})  # which are drawn from the results that are compared
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    dying = [sys.executable, "-c", KILLED_AFTER_A_POINT, *command(text, killed)[3:]]
    assert subprocess.run(dying, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
    assert len(list(killed.glob("tiny/points/*.json"))) == 1
    assert not (killed / "tiny" / "report.html").exists()
    for folder in (killed, whole):
        assert main(command(text, folder)[3:]) == 0
    first, second = (without_timings(load_results(folder / "tiny")) for folder in (killed, whole))
    assert first.pop("command") != second.pop("command")  # the folders
    assert first == second


def test_a_stopped_sweep_says_how_to_go_on(text, tmp_path):
    process = subprocess.Popen(
        command(text, tmp_path, "--steps", "4000"), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(tmp_path.glob("tiny/programs/[!.]*.json")):
        time.sleep(0.01)
    time.sleep(0.2)
    process.terminate()
    _, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "0 of 4 points finished" in told
    assert "to go on, run the same command again" in told
    assert "--steps 4000" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstrat"], "unknown preset 'quickstrat': did you mean 'quickstart'"),
        (["quickstart", "--axes", "temprature=1,2"], "unknown axis 'temprature': did you mean 'temperature'"),
        (["quickstart", "--axes", "temperature=0"], "temperature is 0.0: expected a number greater than 0"),
        (["quickstart", "--axes", "attention=TopQ(k=1)"], "unknown method 'topq'"),
        (["quickstart", "--temperature", "2"], "'temperature' is an axis of the sweep"),
        (["quickstart", "--name", "../escape"], "name is '../escape'"),
        (["quickstart", "--model.heads", "5"], "model.width is 64: expected a multiple of heads = 5"),
        (["quickstart", "--data.source", "nowhere.txt"], "data.source is 'nowhere.txt': no such file"),
        (["quickstart", "--lanes", "0"], "lanes is 0: expected an integer of at least 1"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(arguments, message, tmp_path, capsys):
    place = ["--folder", str(tmp_path / "runs")] if arguments[0] in preset_names() else []
    assert main([*arguments, *place]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_configuration_is_refused_by_name_and_replaced_on_demand(text, tmp_path):
    run_sweep(tiny(text, tmp_path), product(seed=[0]))
    other = tiny(text, tmp_path, steps=3)
    with pytest.raises(ValueError, match=r"steps: 6, now 3\. Choose another --name, or .* --overwrite"):
        run_sweep(other, product(seed=[0]))
    with pytest.raises(ValueError, match=r"axes.seed: \[0\], now \[1\]\."):
        run_sweep(tiny(text, tmp_path), product(seed=[1]))
    results = run_sweep(other, product(seed=[0]), overwrite=True)
    assert [len(point["losses"]) for point in results["points"]] == [3]


def test_a_foreign_folder_is_left_alone(text, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds no sweep"):
            run_sweep(tiny(text, tmp_path), product(seed=[0]), overwrite=overwrite)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_one_is_refused(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is no folder that can be written to: choose another --folder"):
        run_sweep(tiny(text, tmp_path / "file"), product(seed=[0]))


def test_a_full_disk_leaves_no_half_written_file(text, tmp_path, monkeypatch, capsys):
    arguments = command(text, tmp_path)[3:]
    written = []

    def fsync(_):
        written.append(1)
        if len(written) == 4:  # sweep.json, the program, the first point; then the disk is full
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(arguments) == 1
    assert "free some space, and run the same command again" in capsys.readouterr().err
    files = [path for path in (tmp_path / "tiny").rglob("*") if path.is_file()]
    assert len(files) == 3
    for path in files:
        json.loads(path.read_text())


def test_a_point_that_diverges_is_a_result(text, tmp_path):
    rates = axis("optimizer.learning_rate", [1e-2, 1e30])
    results = run_sweep(tiny(text, tmp_path), rates)
    healthy, diverged = results["points"]
    assert healthy["diverged_at"] is None
    assert 0 <= diverged["diverged_at"] <= 6
    assert diverged["diverged_in"]
    assert all(np.isfinite(diverged["losses"]))
    assert report.write_report(tmp_path / "tiny", results).exists()


def test_results_say_what_is_needed_to_run_again(square):
    assert square["config"]["model"]["width"] == 8
    assert square["axes"] == {"scale": [0.25, 0.5], "temperature": [1.0, 2.0]}
    assert square["environment"]["versions"]["jax"]
    assert square["environment"]["device"]
    assert [program["resolved"] for program in square["programs"].values()] == [["Exact()"]]
    assert len(square["corpus"]["hash"]) == 64
    (program,) = square["programs"].values()
    assert program["timings"]["compile_seconds"] > 0
    assert program["memory"]["temporary_bytes"] > 0
    assert program["cost"]["flops"] > 0


@pytest.mark.parametrize("name", preset_names())
def test_presets_can_be_planned_and_say_how_to_run(name):
    preset, description = load_preset(name)
    assert f"python -m experiments.sweep {name}" in description
    assert preset.axes.points
    assert "minutes" in description


def test_quickstart_has_equal_ratios_in_powers_of_two():
    preset, _ = load_preset("quickstart")
    scales, temperatures = preset.axes.values("scale"), preset.axes.values("temperature")
    assert min(len(scales), len(temperatures)) >= 3
    assert all(np.frexp(number)[0] == 0.5 for number in [*scales, *temperatures])
    assert len({s / t for s in scales for t in temperatures}) < len(scales) * len(temperatures)
    assert attention.Exact() in preset.axes.values("attention")


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        read_command(["quickstart", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for option in ("--axes", "--population", "--lanes", "--overwrite", "--name", "--folder", "--steps", "--seed"):
        assert option in told


def test_json_has_no_word_for_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
