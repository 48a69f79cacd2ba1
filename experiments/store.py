"""The folder of a sweep: what it is, which points are finished, and its results."""

import json
import os
from pathlib import Path
from typing import Any

from experiments.files import remove_folder, write_json, write_text

FORMAT = 1
"""The version of the files that this code reads and writes."""


class Store:
    """`<folder>/sweep.json` says what the sweep is; `points/` and `programs/` hold one file for each that is done."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest

    def check(self, *, overwrite: bool) -> None:
        """Raises ValueError if the folder cannot be written, or holds no sweep, or one that differs and must stay."""
        nearest = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ValueError(f"{nearest} is no folder that can be written to: choose another --folder or --name")
        path = self.folder / "sweep.json"
        if not path.exists():
            # A process killed before its first file was in place leaves that file's temporary.
            if self.folder.exists() and any(path.name != ".sweep.json.tmp" for path in self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and holds no sweep: choose another --name")
            return
        if not overwrite:
            self._check_same(path)

    def _check_same(self, path: Path) -> None:
        found = _read(path)
        if found is None:
            raise ValueError(f"{path} is no JSON: choose another --name, or replace the sweep with --overwrite")
        differing = differences(found, self.manifest)
        if len(differing) > 1:  # the points follow from the rest, unless axes are combined in another way
            differing = [line for line in differing if not line.startswith("points:")]
        if differing:
            listed = "; ".join(differing[:8]) + ("; ..." if len(differing) > 8 else "")
            raise ValueError(
                f"{self.folder} holds a sweep with another configuration: {listed}. "
                f"Choose another --name, or replace the old sweep with --overwrite"
            )

    def open(self, *, overwrite: bool) -> None:
        """Makes the folder: after a `check`, or in place of the sweep that it holds."""
        if overwrite and (self.folder / "sweep.json").exists():
            remove_folder(self.folder)
        for part in ("points", "programs"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "sweep.json", self.manifest)

    def finished(self, identifier: str) -> dict[str, Any] | None:
        """The record of a finished point, or None."""
        return _read(self.folder / "points" / f"{identifier}.json")

    def program(self, identifier: str) -> dict[str, Any] | None:
        """The record of a compiled program, or None."""
        return _read(self.folder / "programs" / f"{identifier}.json")

    def finish(self, record: dict[str, Any]) -> None:
        write_json(self.folder / "points" / f"{record['id']}.json", record)

    def compiled(self, identifier: str, record: dict[str, Any]) -> None:
        write_json(self.folder / "programs" / f"{identifier}.json", record)

    def write_results(self, results: dict[str, Any]) -> None:
        # In this order of keys, which is that of the sweep.
        write_text(self.folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, as `path: old, now new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name}: {json.dumps(old)}, now {json.dumps(new)}"]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
