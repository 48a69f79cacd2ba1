"""Runs one of the studies in `configs/studies/`: `python -m experiments.study NAME [options]`.

A study trains the points of its axes in `<folder>/<name>/`, measures them, and writes results.json with every row and
its mean and spread over seeds, a figure as SVG and PNG, and a page. Started again it goes on where it stopped, and a
finished point is never trained again.

Exit codes: 0 finished, 1 a number stopped being finite or the disk is full, 2 a wrong option or input, 130 and 143
stopped by SIGINT and SIGTERM.
"""

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from markupsafe import Markup

from experiments.cli import exit_code
from experiments.config import to_dict
from experiments.drawing import drawn, inlined
from experiments.files import write_bytes, write_json, write_text
from experiments.pages import flat, paragraphs, templates
from experiments.paths import UNSWEPT
from experiments.presets import Sweep
from experiments.provenance import describe_corpus
from experiments.runtime import environment, start_process
from experiments.studies import Study, Work, load_study, study_names, summarised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    name: Annotated[str, tyro.conf.Positional]
    """The study: a module of `configs/studies/`."""
    smoke: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run its small form, which shows that everything works and nothing else."""
    population: Literal["auto", "vmap", "loop"] = "auto"
    """How the points of a sweep's program are trained: side by side under vmap, one after the other, or as suits the
    device."""
    lanes: int = 16
    """Points side by side under vmap, at most."""
    folder: Path = Path("runs")
    """Where runs are kept."""
    out: Path | None = None
    """Folder for results.json, the figure and the page; `study` in the folder of the runs if not given."""


def run_study(options: Options) -> Path:
    """Trains, measures, and writes what was found; returns the folder of the results.

    Raises:
        ValueError: there is no such study, or its folder holds something else.
        Interrupted: SIGTERM or SIGINT; finished points are saved.
        OSError: something could not be written; finished points are intact.
    """
    study, description = load_study(options.name, smoke=options.smoke)
    name = f"{options.name}-smoke" if options.smoke else options.name
    command = _command(options)
    sweep = study.sweep
    if sweep is not None:
        sweep = Sweep(base=dataclasses.replace(sweep.base, name=name, folder=options.folder), axes=sweep.axes)
    rows = study.measure(
        Work(
            sweep=sweep,
            preset=name,
            description=description,
            command=command,
            population=options.population,
            lanes=options.lanes,
        )
    )
    out = options.out or options.folder / name / "study"
    out.mkdir(parents=True, exist_ok=True)
    record = {"study": options.name, "smoke": options.smoke, "command": command, **conditions(study, sweep)}
    record |= {"summary": summarised(rows), "rows": rows}
    files = drawn(lambda results: study.figure(results["summary"]), record)
    for kind, content in files.items():
        write_bytes(out / f"{options.name}.{kind}", content)
    write_json(out / "results.json", record)
    caption = " ".join((study.figure.__doc__ or "").split())
    write_text(out / "page.html", page(record, description, files["svg"], caption))
    return out


def _command(options: Options) -> str:
    """What makes the results again, but for the folders."""
    words = ["python -m experiments.study", options.name, *(["--smoke"] if options.smoke else [])]
    for name in ("population", "lanes"):
        if (value := getattr(options, name)) != getattr(Options, name):
            words.append(f"--{name} {value}")
    return " ".join(words)


def page(record: dict[str, Any], description: str, svg: bytes, caption: str) -> str:
    """The page of a study as text, its figure inside it."""
    tables: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Any]] = {}
    for row in record["summary"]:  # rows of different kinds have tables of their own
        tables.setdefault((tuple(row["axes"]), tuple(row["numbers"])), []).append(row)
    told = ("versions", "backend", "device", "cores", "corpus", "measures")
    return (
        templates()
        .get_template("study.html.jinja")
        .render(
            record=record,
            paragraphs=paragraphs(description),
            svg=Markup(inlined(svg, record["study"], caption)),
            caption=caption,
            tables=[(*names, rows) for names, rows in tables.items()],
            facts=flat({name: record[name] for name in told if name in record}),
        )
    )


def conditions(study: Study, sweep: Sweep | None) -> dict[str, Any]:
    """What the results depend on: versions, the machine, and what is asked of all points and of each."""
    return {**environment(), "cores": os.cpu_count(), **asked(study), **_corpus(sweep)}


def asked(study: Study) -> dict[str, Any]:
    """What a study trains, and what it measures with: the same for the results of the study as it is today."""
    options = study.measure.keywords if isinstance(study.measure, functools.partial) else {}
    found: dict[str, Any] = {"measures": {name: to_dict(value) for name, value in options.items()}}
    if study.sweep is None:
        return found
    config = {name: value for name, value in to_dict(study.sweep.base).items() if name not in UNSWEPT}
    axes = {name: [to_dict(value) for value in study.sweep.axes.values(name)] for name in study.sweep.axes.names}
    return found | {"config": config, "axes": axes}


def _corpus(sweep: Sweep | None) -> dict[str, Any]:
    return {} if sweep is None else {"corpus": describe_corpus(sweep.base)}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        listed = "\n".join(f"  {name:<20}{load_study(name)[1].splitlines()[0]}" for name in study_names())
        about = f"{__doc__}\nstudies:\n{listed}"
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.study", description=about)
        print(f"written: {run_study(options)}/results.json, {options.name}.svg, {options.name}.png, page.html")

    start_process()
    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
