"""The index of a folder of runs, and the commands that it gives."""

import json
import re
import shutil
from typing import Annotated

import pytest
import tyro

import attention
from experiments.cli import parse
from experiments.commands import train_command
from experiments.config import Data, Model, Run
from experiments.entries import entries
from experiments.index import main, write_index
from experiments.store import Store


@pytest.fixture
def root(reference, tmp_path):
    """A folder with a run, one that stopped, a sweep, a study, a benchmark, and what is none of these."""
    shutil.copytree(reference.folder / reference.name, tmp_path / "deep" / "done")
    shutil.copytree(reference.folder / reference.name, tmp_path / "stopped")
    (tmp_path / "stopped" / "result.json").unlink()
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines(keepends=True)
    until = next(i for i, line in enumerate(lines) if '"validation_loss"' in line and '"step": 20' in line)
    (tmp_path / "stopped" / "metrics.jsonl").write_text("".join(lines[: until + 1]))
    rest = {"versions": {"jax": "0.1"}, "device": "cpu"}
    store = Store(tmp_path / "swept", {"points": []})
    store.open(overwrite=False)
    about = {"command": "python -m experiments.sweep <b>", "planned": 3, "programs": {"p": {}}, "environment": rest}
    store.write_results(about | {"config": {"steps": 10}, "points": [swept(3.0, 2.5), swept(3.0, 2.25, None)]})
    none = Store(tmp_path / "begun", {"points": [{}, {}]})
    none.open(overwrite=False)
    study = {"study": "sinks", "command": "python -m experiments.study sinks", "rows": [1], "summary": [{"seeds": 3}]}
    _write(tmp_path / "sinks" / "study", study | rest, "sinks.svg", "page.html")
    _write(tmp_path / "exact", {"benchmark": "exact", "cells": [1, 2], "environment": rest}, "exact.svg")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"config": {"stps": 1}}')
    none.write_results(about | {"config": {"steps": 10}, "points": []})
    Store(tmp_path / "compiling", {"points": [{}, {}]}).open(overwrite=False)
    return tmp_path


def swept(*losses):
    return {"evaluations": [{"step": 5 * at, "loss": loss} for at, loss in enumerate(losses)]}


def _write(folder, results, *files):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    for name in files:
        (folder / name).write_text("")


def test_everything_is_listed_with_what_it_is_and_its_loss(root, reference):
    found = {entry.path: entry for entry in entries(root)}
    assert {path: entry.kind for path, entry in found.items()} == {
        "begun": "sweep",
        "broken": "run",
        "compiling": "sweep",
        "deep/done": "run",
        "exact": "benchmark",
        "sinks/study": "study",
        "stopped": "run",
        "swept": "sweep",
    }
    result = json.loads((root / "deep" / "done" / "result.json").read_text())
    assert found["deep/done"].loss == f"{result['validation_loss']:.4f}"
    assert found["stopped"].loss.endswith(" after 20 of 30 steps")
    assert "unknown field of Run 'stps'" in found["broken"].loss
    assert (found["begun"].loss, found["compiling"].loss) == ("none yet", "0 of 2 points")
    assert found["swept"].loss == "2.2500 at best"
    assert found["swept"].curves == (((0, 3), (0.5, 2.5)), ((0, 3), (0.5, 2.25)))
    assert [x for x, _ in found["deep/done"].curves[0]] == [10 / 30, 20 / 30, 1]
    assert (found["sinks/study"].page, found["sinks/study"].image) == ("sinks/study/page.html", "sinks/study/sinks.svg")


def test_a_thumbnail_is_the_curve_in_its_frame(root):
    (entry,) = [entry for entry in entries(root) if entry.path == "deep/done"]
    points = [tuple(map(float, pair.split(","))) for pair in entry.lines[0].split()]
    losses = [loss for _, loss in entry.curves[0]]
    heights = [y for _, y in points]
    assert heights[losses.index(max(losses))] == 1.0
    assert heights[losses.index(min(losses))] == 31.0
    assert points[-1][0] == 119.0


def test_the_page_links_what_is_there_and_holds_no_address_of_its_own(root, capsys):
    assert main([str(root)]) == 0
    text = (root / "index.html").read_text()
    assert str(root) not in text
    for address in re.findall(r"""(?:src|href)=["']([^"'#]+)""", text):
        assert (root / address).exists(), address
    assert "prefers-color-scheme: dark" in text
    assert "<script" not in text
    assert "sweep &lt;b&gt;" in text
    before = text
    assert write_index(root).read_text() == before
    assert main([str(root / "elsewhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


RUNS = [
    Run(),
    Run(name="a", steps=7, temperature=0.25, scale=1e-3, soft_cap=15.0, adaptive=True, probes=("TopK(k=2)", "Taylor")),
    Run(
        attention=attention.BlockTopK(blocks=2, window=3),
        model=Model(layers=2, gated=True, layer_methods=("Exact", "TopK(k=2)"), scale_rule="qk-norm"),
        data=Data(task="mqar", pairs=3),
    ),
]


@pytest.mark.parametrize("run", RUNS)
def test_the_command_of_a_run_makes_it_again(run):
    """Read as the trainer reads it."""

    def command(run: Annotated[Run, tyro.conf.arg(name="")]) -> Run:
        return run

    assert parse(command, train_command(run)[3:], prog="train") == run
