"""What lies in a folder of runs: runs, sweeps, studies, evaluations and benchmarks, read from their files."""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.commands import train_command
from experiments.files import read_json_lines
from experiments.saved import load_run

LEFT_OUT = frozenset({"points", "programs", "figures", "checkpoints", "tensorboard"})
"""Folders in which nothing that is listed lies."""
WIDTH, HEIGHT = 120, 32
"""Of a thumbnail, in pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that was made.

    Attributes:
        path: its folder, relative to the index.
        kind: what it is.
        command: what made it.
        facts: what it depends on, without dates.
        loss: its loss in words, where it has one.
        curves: validation losses during training, as pairs of the share of the steps and the loss.
        page: a page about it, relative to the index.
        image: a figure of it, relative to the index.
    """

    path: str
    kind: str
    command: str = ""
    facts: tuple[str, ...] = ()
    loss: str = ""
    curves: tuple[tuple[tuple[float, float], ...], ...] = ()
    page: str = ""
    image: str = ""

    @property
    def lines(self) -> list[str]:
        """The curves as points of polylines, the lowest loss of all of them at the bottom."""
        losses = [loss for curve in self.curves for _, loss in curve]
        low, high = min(losses, default=0.0), max(losses, default=1.0)
        span = (high - low) or 1.0
        return [
            " ".join(f"{1 + x * (WIDTH - 2):.1f},{1 + (high - y) / span * (HEIGHT - 2):.1f}" for x, y in curve)
            for curve in self.curves
        ]


def entries(root: Path) -> list[Entry]:
    """What lies below a folder, by path. A folder whose files cannot be read is listed as that."""
    return [_entry(root, folder) for folder in _folders(root) if _kind(folder)]


def _folders(folder: Path) -> Iterator[Path]:
    children = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for path in children:
        if path.name not in LEFT_OUT and path.name[0] != ".":
            yield path
            yield from _folders(path)


def _kind(folder: Path) -> str | None:
    if (folder / "config.json").is_file():
        return "run"
    if (folder / "sweep.json").is_file():
        return "sweep"
    if not (folder / "results.json").is_file():
        return None
    return {"study": "study", "evaluate": "evaluation"}.get(folder.name, "benchmark")


def _entry(root: Path, folder: Path) -> Entry:
    kind, path = str(_kind(folder)), folder.relative_to(root).as_posix()
    try:
        return dataclasses.replace(READERS[kind](folder, path), path=path, kind=kind)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:  # whatever a damaged file holds
        return Entry(path=path, kind=kind, loss=f"cannot be read: {type(error).__name__}: {error}")


def _run(folder: Path, path: str) -> Entry:
    run, about = load_run(folder), _json(folder / "config.json")
    found = [record for record in read_json_lines(folder / "metrics.jsonl") if "validation_loss" in record]
    curve = tuple((record["step"] / run.steps, record["validation_loss"]) for record in found)
    last = found[-1] if found else None
    loss = "not evaluated yet" if last is None else f"{last['validation_loss']:.4f}"
    if last is not None and not (folder / "result.json").is_file():
        loss += f" after {last['step']} of {run.steps} steps"
    corpus = f"{run.data.task} {about['corpus']['hash'][:12]}"
    facts = (", ".join(dict.fromkeys(about["resolved"])), f"{run.steps} steps", corpus, *_place(about))
    command = train_command(dataclasses.replace(run, folder=type(run)().folder))
    return Entry(path=path, kind="run", command=shlex.join(command), facts=facts, loss=loss, curves=(curve,))


def _sweep(folder: Path, path: str) -> Entry:
    if not (folder / "results.json").is_file():
        done = len(list((folder / "points").glob("*.json")))
        return Entry(path=path, kind="sweep", loss=f"{done} of {len(_json(folder / 'sweep.json')['points'])} points")
    results = _json(folder / "results.json")
    steps, points = results["config"]["steps"], results["points"]
    curves = tuple(
        tuple((x["step"] / steps, x["loss"]) for x in point["evaluations"] if x["loss"] is not None) for point in points
    )
    lowest = min((curve[-1][1] for curve in curves if curve), default=None)
    facts = (f"{len(points)} of {results['planned']} points", f"{len(results['programs'])} programs")
    return Entry(
        path=path,
        kind="sweep",
        command=results["command"],
        facts=(*facts, f"{steps} steps", *_place(results["environment"])),
        loss="none yet" if lowest is None else f"{lowest:.4f} at best",
        curves=curves,
        page=_there(folder, path, "report.html"),
    )


def _study(folder: Path, path: str) -> Entry:
    record = _json(folder / "results.json")
    seeds = max(row["seeds"] for row in record["summary"])
    facts = (f"{len(record['rows'])} rows", f"{seeds} seeds", *_place(record))
    page, image = (_there(folder, path, name) for name in ("page.html", f"{record['study']}.svg"))
    return Entry(path=path, kind="study", command=record["command"], facts=facts, page=page, image=image)


def _benchmark(folder: Path, path: str) -> Entry:
    record = _json(folder / "results.json")
    name = record["benchmark"]
    facts = (f"{len(record['cells'])} cells", *_place(record["environment"]))
    command = f"python -m experiments.benchmark {name}"
    return Entry(path=path, kind="benchmark", command=command, facts=facts, image=_there(folder, path, f"{name}.svg"))


def _evaluation(folder: Path, path: str) -> Entry:
    record = _json(folder / "results.json")
    best = min(row["loss"] for row in record["rows"])
    facts = (f"{len(record['rows'])} rows", *_place(record))
    image = _there(folder, path, "evaluate.svg")
    return Entry(path=path, kind="evaluation", facts=facts, loss=f"{best:.4f} at best", image=image)


READERS = {"run": _run, "sweep": _sweep, "study": _study, "benchmark": _benchmark, "evaluation": _evaluation}


def _place(environment: dict[str, Any]) -> tuple[str, ...]:
    return (f"jax {environment['versions']['jax']}", str(environment["device"]))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _there(folder: Path, path: str, name: str) -> str:
    return f"{path}/{name}" if (folder / name).is_file() else ""
