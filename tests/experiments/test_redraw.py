"""Committed results are drawn again from their numbers, and nothing else is touched."""

import shutil
from pathlib import Path

import pytest

from experiments.redraw import main

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    ("name", "figures"), [("population", ["population"]), ("sinks", ["sinks"]), ("quickstart", [])]
)
def test_figures_are_drawn_again(name, figures, tmp_path, capsys):
    path = tmp_path / name / "results.json"
    path.parent.mkdir()
    shutil.copy(RESULTS / name / "results.json", path)
    assert main([str(path.parent)]) == 0
    made = {f"{figure}.{kind}" for figure in figures for kind in ("svg", "png")}
    assert {x.name for x in path.parent.iterdir()} == {"results.json", *made}
    assert path.read_bytes() == (RESULTS / name / "results.json").read_bytes()
    assert (figures or ["left as it is"])[0] in capsys.readouterr().out


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no results.json" in capsys.readouterr().err
