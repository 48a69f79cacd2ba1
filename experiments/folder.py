"""A run's folder: made once, resumed by the same configuration, never overwritten by another."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.checks import check_name
from experiments.config import Run, to_dict
from experiments.files import remove_folder, write_json
from experiments.provenance import describe_corpus, describe_methods
from experiments.runtime import environment


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it writes.

    Attributes:
        path: `<folder>/<name>`.
        description: the content of `config.json`.
    """

    path: Path
    description: dict[str, Any]

    @property
    def metrics(self) -> Path:
        """One JSON line a step and an evaluation; no wall-clock, so that equal runs have equal files."""
        return self.path / "metrics.jsonl"

    @property
    def timings(self) -> Path:
        """Seconds since the process began to train, by step."""
        return self.path / "timings.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of the TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints, by step."""
        return self.path / "checkpoints"

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a finished run."""
        path = self.path / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the result; the run is finished once it is there."""
        write_json(self.path / "result.json", result)


def describe(run: Run) -> dict[str, Any]:
    """A run's configuration, the hash of its text, what it runs on, and what its methods resolve to there."""
    about = describe_corpus(run)
    identity = {name: about[name] for name in ("hash", "bytes", "files") if name in about}
    return {"config": to_dict(run), "corpus": identity, "resolved": describe_methods(run), **environment()}


def open_folder(run: Run, *, overwrite: bool = False) -> RunFolder:
    """The folder of a run, made or found again.

    Raises:
        ValueError: the name is no name of a folder; or the folder holds a run with another configuration,
            another text, or something else.
    """
    check_name(run.name)
    folder = RunFolder(Path(run.folder) / run.name, describe(run))
    config = folder.path / "config.json"
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"{folder.path} is a file: expected a folder, or nothing; choose another name")
    # A process killed before its first file was in place leaves that file's temporary.
    strangers = folder.path.exists() and any(path.name != ".config.json.tmp" for path in folder.path.iterdir())
    if config.exists():
        if not overwrite:
            _check_same(json.loads(config.read_text(encoding="utf-8")), folder)
            return folder
        remove_folder(folder.path)
    elif strangers:
        raise ValueError(f"{folder.path} holds files but no config.json: not the folder of a run; choose another name")
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(config, folder.description)
    return folder


def _check_same(before: dict[str, Any], folder: RunFolder) -> None:
    old, new = (_flat({"config": d["config"], "corpus": d["corpus"]}) for d in (before, folder.description))
    placed = ("config.name", "config.folder")  # where the folder is, not what the run does
    differing = [name for name in sorted(old | new) if old.get(name) != new.get(name) and name not in placed]
    if differing:
        listed = "; ".join(f"{name} was {old.get(name)!r}, is now {new.get(name)!r}" for name in differing)
        raise ValueError(
            f"{folder.path} holds another run: {listed}. Choose another name, or pass --overwrite to replace it"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: leaf for name, x in tree.items() for path, leaf in _flat(x, f"{prefix}.{name}".lstrip(".")).items()}
