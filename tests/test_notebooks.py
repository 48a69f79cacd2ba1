"""The notebooks: text and notebook are one, outputs are of the present text, and executing gives the same verdicts."""

import re

import nbformat
import pytest

from experiments import notebooks

TEXTS = notebooks.texts()


def committed(text):
    return nbformat.read(text.with_suffix(".ipynb"), as_version=4)


def printed(notebook):
    """What the cells wrote to standard output."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(output.text for cell in cells for output in cell.outputs if output.get("name") == "stdout")


def verdicts(notebook):
    """Each claim and whether it held.

    Numbers depend on the machine in the last digits, and are left out. So are verdicts on trained models: training
    carries the last digits into the first ones.
    """
    lines = re.sub(r"\n {4}", " ", printed(notebook)).splitlines()
    found = [line.split(". ")[0] for line in lines if line.startswith(("HOLDS: ", "DOES NOT HOLD: "))]
    claims = [re.sub(r"\d[\d.,e-]*", "#", claim) for claim in found]
    return [claim.partition(": ")[2] if "trained" in claim.replace("untrained", "") else claim for claim in claims]


def figures(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_the_notebook_is_the_executed_text(text):
    cells = committed(text).cells
    assert [cell.source for cell in cells] == [cell.source for cell in notebooks.unexecuted(text).cells], (
        "run `make notebooks`"
    )
    assert [cell.execution_count for cell in cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in cells))
    )
    nbformat.validate(committed(text))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_the_notebook_imports_the_library_only(text):
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text.read_text(), re.MULTILINE))
    standard = {"itertools", "textwrap"}
    assert imported - standard <= {"attention", "flax", "jax", "matplotlib", "numpy", "optax"}


@pytest.mark.campaign  # minutes, and `make notebooks` does the same
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_executing_the_text_gives_the_committed_verdicts(text):
    fresh, kept = notebooks.executed(text), committed(text)
    assert verdicts(kept)
    assert verdicts(fresh) == verdicts(kept), "run `make notebooks`"
    assert len(figures(fresh)) == len(figures(kept)) > 0
