"""Draws committed results again, without measuring anything: `python -m experiments.redraw docs/results/*`.

Of each folder whose results.json a benchmark or a study wrote, the figures are replaced by what is drawn today; others
are left as they are.

Exit codes: 0 finished, 2 a wrong option or input.
"""

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import benchmark, records
from experiments.cli import exit_code
from experiments.drawing import drawn
from experiments.files import write_bytes
from experiments.studies import load_study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of results."""


def redrawn(folder: Path) -> list[str]:
    """Draws the figures of one folder and returns their names; none where no benchmark or study wrote it.

    Raises:
        ValueError: the folder holds no results.json.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"folders has {folder}, which holds no results.json: expected a folder of docs/results")
    record = json.loads(path.read_text(encoding="utf-8"))
    if "benchmark" in record:
        figures, _ = benchmark.drawn(_benchmark(record["benchmark"]), record["cells"])
        records.save(folder, figures, record["benchmark"])
        return list(figures)
    if "study" not in record:
        return []
    study, _ = load_study(record["study"], smoke=record["smoke"])
    for kind, content in drawn(lambda results: study.figure(results["summary"]), record).items():
        write_bytes(folder / f"{record['study']}.{kind}", content)
    return [record["study"]]


def _benchmark(name: str) -> Any:
    """A benchmark with the options that it has by itself: figures depend on results alone."""
    classes = [typing.get_args(choice)[0] for choice in typing.get_args(benchmark.Benchmark)]
    return next(cls for cls in classes if cls.__name__.lower() == name)()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        for folder in tyro.cli(
            Options, args=arguments, prog="python -m experiments.redraw", description=__doc__
        ).folders:
            print(f"{folder}: {', '.join(redrawn(folder)) or 'left as it is'}")

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
