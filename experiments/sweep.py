"""Trains every point of a preset's axes and writes a report: `python -m experiments.sweep PRESET [options]`.

Presets are the modules of `configs/`. A sweep lives in `<folder>/<name>/`: `sweep.json` (what it is), `points/`
(one file for each finished point), `programs/` (what compiling took), and at the end `results.json`,
`report.html` and `figures/`. Points that differ in scale, temperature, learning rate or seed alone share one
compilation. Started again with the same options it goes on where it stopped: a finished point is never run
again, and the others end with the same bits.

Exit codes: 0 finished, 1 the disk is full, 2 a wrong option, 130 and 143 stopped by SIGINT and SIGTERM.
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from experiments.axes import Axes, parse_axis, product
from experiments.campaign import Plan, execute, make_plan
from experiments.cli import exit_code, parse
from experiments.config import Run
from experiments.display import cells, table
from experiments.files import is_disk_full
from experiments.paths import look_up, paths
from experiments.presets import Sweep, load_preset, preset_names
from experiments.report import write_report
from experiments.runtime import start_process
from experiments.summary import Results, point_row, points_of

PROGRAM = "python -m experiments.sweep"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a sweep that are not those of its runs."""

    axes: tuple[str, ...] = ()
    """Axes to sweep as a product in place of the preset's: NAME=VALUE,VALUE with any option of the run below as
    NAME, such as `temperature=0.5,1,2` or `attention=Exact,TopK(k=16)`."""
    population: Literal["auto", "vmap", "loop"] = "auto"
    """How the points of a program are trained: side by side under vmap, one after the other, or as suits the
    device (vmap on GPU and TPU, loop on CPU)."""
    lanes: int = 16
    """Points side by side under vmap, at most."""
    overwrite: bool = False
    """Replace the sweep of this name, whatever it is."""


def sweep(plan: Plan, console: Console) -> None:
    """Runs what is left of a plan, writes results and report, prints the table and where they are.

    Raises:
        Interrupted: SIGTERM or SIGINT; finished points are saved, and so are the results so far.
        OSError: the disk is full, or the folder cannot be written; finished points are intact.
    """
    try:
        results = execute(plan, console)
        report = write_report(plan.folder, results)
    except OSError as error:
        advice = "; free some space" if is_disk_full(error) else ""
        message = f"{error.strerror or error} while writing to {plan.folder}; finished points are intact{advice}"
        raise OSError(error.errno, f"{message}, and run the same command again") from error
    console.print(table([cells(row) for row in _rows(results)]))
    console.print(f"results: {plan.folder / 'results.json'}", highlight=False, soft_wrap=True)
    console.print(f"report:  {report}", highlight=False, soft_wrap=True)


def _rows(results: Results) -> list[dict[str, Any]]:
    return [point_row(results, point) for key in results["programs"] for point in points_of(results, key)]


def read_command(arguments: list[str]) -> Plan:
    """The plan that a command line describes. Nothing is written.

    Raises:
        ValueError, FileNotFoundError, UnsupportedError: what is asked for cannot be done.
    """
    if not arguments or arguments[0].startswith("-"):
        # No preset: the help of all of them, or the error that one is missing.
        wanted = bool({"-h", "--help"} & set(arguments))
        print(_usage(), file=sys.stdout if wanted else sys.stderr)
        raise SystemExit(0 if wanted else 2)
    name, *rest = arguments
    preset, description = load_preset(name)
    default = dataclasses.replace(preset.base, name=name if preset.base.name == Run().name else preset.base.name)
    about = f"{description}\n\n{_about()}"
    options, run = parse(_command(default), rest, f"{PROGRAM} {name}", description=about)
    axes = product(*(parse_axis(text) for text in options.axes)) if options.axes else preset.axes
    _refuse_swept_options(preset, run, axes)
    command = shlex.join([*PROGRAM.split(), *arguments])
    return make_plan(
        Sweep(base=run, axes=axes),
        preset=name,
        description=description,
        command=command,
        population=options.population,
        lanes=options.lanes,
        overwrite=options.overwrite,
    )


def _command(default: Run) -> Callable[..., tuple[Options, Run]]:
    # Names of its own options first in the help, then those of the run, without prefixes.
    def command(
        sweep: Annotated[Options, tyro.conf.arg(name="")] = Options(),
        run: Annotated[Run, tyro.conf.arg(name="")] = default,
    ) -> tuple[Options, Run]:
        return sweep, run

    return command


def _refuse_swept_options(preset: Sweep, run: Run, axes: Axes) -> None:
    for name in paths(run):
        swept = [axis for axis in axes.names if axis == name or axis.startswith(f"{name}.")]
        if swept and look_up(run, name) != look_up(preset.base, name):
            raise ValueError(
                f"--{name} is set to {look_up(run, name)}, but {swept[0]!r} is an axis of the sweep: "
                f"change its values with --axes {swept[0]}=VALUE,VALUE"
            )


def _about() -> str:
    return (__doc__ or "").partition("\n\n")[2].strip()


def _usage() -> str:
    presets = [f"  {name:<16}{load_preset(name)[1].splitlines()[0]}" for name in preset_names()]
    head = f"usage: {PROGRAM} PRESET [options]\n\n{(__doc__ or '').strip()}\n\npresets:\n"
    return head + "\n".join(presets) + f"\n\n`{PROGRAM} PRESET --help` lists the options of a preset."


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    start_process()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log has no width of its own
    arguments = sys.argv[1:] if arguments is None else arguments
    return exit_code(lambda: sweep(read_command(arguments), console))


if __name__ == "__main__":
    sys.exit(main())
