"""What a benchmark writes: its results with what they depend on, and their figures."""

import contextlib
import dataclasses
import io
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments.files import write_bytes, write_json
from experiments.runtime import environment


def written(benchmark: Any, results: list[dict[str, Any]], drawings: dict[str, Figure]) -> None:
    """Writes results.json and the figures into the benchmark's folder."""
    name = type(benchmark).__name__.lower()
    record = {"benchmark": name, "config": told(benchmark), "environment": _environment(), "cells": results}
    benchmark.out.mkdir(parents=True, exist_ok=True)
    write_json(benchmark.out / "results.json", record)
    save(benchmark.out, drawings, name)
    print(f"written: {benchmark.out}/results.json, {', '.join(f'{x}.svg, {x}.png' for x in drawings)}")


def save(folder: Path, drawings: dict[str, Figure], salt: str) -> None:
    """Writes figures into a folder: the same ones give the same bytes."""
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        for name, drawing in drawings.items():
            for kind, details in (("svg", {"Date": None}), ("png", None)):
                buffer = io.BytesIO()
                drawing.savefig(buffer, format=kind, dpi=150, metadata=details)
                write_bytes(folder / f"{name}.{kind}", buffer.getvalue())


def told(benchmark: Any) -> dict[str, Any]:
    """The options of a benchmark as its results record them."""
    return {name: _told(value) for name, value in dataclasses.asdict(benchmark).items()}


def _told(value: Any) -> Any:
    """An option as JSON takes it: of a file its name, since where it lay says nothing of the results."""
    if isinstance(value, tuple):
        return [_told(item) for item in value]
    return value.name if isinstance(value, Path) else value


def _environment() -> dict[str, Any]:
    """What a time depends on: the versions, the peers' too, the device, and the number of its cores."""
    found = environment()
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["versions"]["torch"] = metadata.version("torch")
    return found | {"cores": os.cpu_count()}
