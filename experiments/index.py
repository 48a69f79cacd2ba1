"""Lists everything in a folder of runs: `python -m experiments.index [runs]` writes `index.html` into it.

Runs, sweeps, studies and benchmarks, wherever they lie below the folder: the command that made each, what it depends
on, its loss, and how that fell.

Exit codes: 0 finished, 1 the disk is full, 2 a wrong option.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.cli import exit_code
from experiments.entries import HEIGHT, WIDTH, entries
from experiments.files import write_text
from experiments.pages import templates


def write_index(root: Path) -> Path:
    """Writes `index.html` into a folder of runs and returns its path.

    Raises:
        ValueError: there is no such folder.
        OSError: it cannot be written.
    """
    if not root.is_dir():
        raise ValueError(f"folder is {root}: no such folder; expected one that runs are kept in, such as runs")
    page = root / "index.html"
    template = templates().get_template("index.html.jinja")
    write_text(page, template.render(entries=entries(root), width=WIDTH, height=HEIGHT))
    return page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Where runs are kept."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.index", description=__doc__)
        print(f"index: {write_index(options.folder)}")

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
