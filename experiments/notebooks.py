"""The notebooks, from their texts: each `notebooks/*.py` is executed and written beside itself as `.ipynb`.

python -m experiments.notebooks                      executes all
python -m experiments.notebooks 01_scaled_dot_product     executes one
"""

import os
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from experiments.files import write_text

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
SECONDS_A_CELL = 600


def texts() -> list[Path]:
    """The texts, in order."""
    return sorted(FOLDER.glob("*.py"))


def unexecuted(text: Path) -> NotebookNode:
    """The notebook that a text is, without outputs; the same text gives the same notebook."""
    notebook = jupytext.read(text)
    notebook.metadata = _metadata(notebook)
    for number, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
    return notebook


def executed(text: Path) -> NotebookNode:
    """The notebook with its outputs, run from the checkout's root in a process of its own.

    What the compiler says on stderr depends on the machine and its load, and is left out.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message has its traceback.
    """
    notebook = unexecuted(text)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    # On a busy machine a kernel starts late and its outputs come late: they must not be given up in silence.
    patience: Any = {"startup_timeout": SECONDS_A_CELL, "iopub_timeout": SECONDS_A_CELL, "raise_on_iopub_timeout": True}
    # What a cell prints comes in pieces that depend on the load; joined, the same text gives the same outputs.
    written: Any = {"record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, timeout=SECONDS_A_CELL, kernel_name="python3", **written, **patience)
    client.execute(cwd=str(ROOT), env=environment)
    notebook.metadata = _metadata(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def _metadata(notebook: NotebookNode) -> NotebookNode:
    """The kernel's name alone: versions of the interpreter belong to the machine."""
    kernel = dict(notebook.metadata["kernelspec"])
    return nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})


def main() -> None:
    """Executes the named notebooks, or all."""
    for text in texts():
        if text.stem in sys.argv[1:] or not sys.argv[1:]:
            write_text(text.with_suffix(".ipynb"), nbformat.writes(executed(text)) + "\n")


if __name__ == "__main__":
    main()
