"""Makes the report of a sweep again, from its results.json alone.

    python -m experiments.report runs/quickstart

writes `report.html`, which needs no other file, and `figures/*.svg` and `figures/*.png` into the folder.
"""

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.cli import exit_code
from experiments.drawing import drawn, inlined
from experiments.figures import FIGURES
from experiments.files import write_bytes, write_text
from experiments.metrics import SHOWN
from experiments.pages import flat, paragraphs, short, templates
from experiments.probe_figures import probe_errors, probed
from experiments.store import FORMAT
from experiments.summary import Results, measured, point_row, points_of, summary_rows, unit

ALLOWANCE = 0.05
"""How far above exact attention's loss, in nats a token, still counts as keeping up."""


def write_report(folder: Path, results: Results) -> Path:
    """Writes the figures and report.html into `folder`; returns the page's path.

    Raises:
        ValueError: no point is finished.
        OSError: the folder cannot be written, or the disk is full.
    """
    if not results["points"]:
        raise ValueError(f"{folder} has no finished point to report on: run the sweep again to go on with it")
    files = {name: drawn(draw, results) for name, draw in figures_of(results).items()}
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, kinds in files.items():
        for kind, content in kinds.items():
            write_bytes(folder / "figures" / f"{name}.{kind}", content)
    page = folder / "report.html"
    write_text(page, rendered(results, {name: kinds["svg"] for name, kinds in files.items()}, folder))
    return page


def rendered(results: Results, svgs: dict[str, bytes], folder: Path) -> str:
    """The page as text, the figures inside it."""
    rows = summary_rows(results, ALLOWANCE)
    points = [point_row(results, point) for key in results["programs"] for point in points_of(results, key)]
    return (
        templates()
        .get_template("report.html.jinja")
        .render(
            results=results,
            paragraphs=paragraphs(results["description"] or ""),
            folder=folder,
            allowance=ALLOWANCE,
            has_reference=any(row["gap"] for row in rows),
            rows=[row | {"within": _range(row), "bits": row["best"] / math.log(2)} for row in rows],
            figures=[_figure(name, svgs[name], draw) for name, draw in figures_of(results).items()],
            programs=[_program(results, key) for key in results["programs"]],
            points=points,
            is_text=unit(results) == "byte",
            unit=unit(results),
            has_accuracy=any(not math.isnan(point["accuracy"]) for point in points),
            measured=measured(results),
            shown=SHOWN,
            facts=_facts(results),
        )
    )


def load_results(folder: Path) -> Results:
    """The contents of `folder`/results.json.

    Raises:
        ValueError: there is none, or it is no results file of this version.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no results.json: expected the folder of a sweep that has finished a point")
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; run the sweep again to write it anew") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        found = results.get("format") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"{path} has format {found!r}: expected {FORMAT}")
    return results


def figures_of(results: Results) -> dict[str, Callable[[Results], Figure]]:
    """The figures of a sweep: that of the probes where its runs have some."""
    return FIGURES | ({"probes": probe_errors} if probed(results)[1] else {})


def _figure(name: str, svg: bytes, draw: Callable[[Results], Figure]) -> dict[str, Any]:
    caption = " ".join((draw.__doc__ or "").split())
    title = name.replace("_", " ").capitalize()
    return {"name": name, "title": title, "caption": caption, "svg": Markup(inlined(svg, name, caption))}


def _program(results: Results, key: str) -> dict[str, Any]:
    points = points_of(results, key)
    seconds = [point["timings"]["seconds_per_step"] for point in points]
    median = 1e3 * statistics.median(seconds) if seconds else math.nan
    return dict(results["programs"][key]) | {"points": len(points), "milliseconds": median}


def _facts(results: Results) -> list[tuple[str, Any]]:
    return flat({"corpus": results["corpus"], **results["environment"], "population": results["population"]})


def _range(row: dict[str, Any]) -> str:
    """The betas that a method tolerates; as a range where they are neighbours."""
    tolerated = row["tolerated"]
    if tolerated == row["betas"]:
        return "all"
    first = row["betas"].index(tolerated[0]) if tolerated else 0
    if len(tolerated) > 2 and row["betas"][first : first + len(tolerated)] == tolerated:
        return f"{tolerated[0]:.4g} to {tolerated[-1]:.4g}"
    return ", ".join(short(beta) for beta in tolerated) or "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional]
    """The folder of a sweep, which holds its results.json."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def command() -> None:
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.report", description=__doc__)
        print(f"report: {write_report(options.folder, load_results(options.folder))}")

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
