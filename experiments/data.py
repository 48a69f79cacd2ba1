"""Batches through grain: of text as bytes, with its corpus, hash and split, or of a task.

The last `validation_share` of the bytes, one contiguous tail, is held out; training reads only what is before
it. A training sequence is one of the non-overlapping windows of `context` + 1 bytes, neighbours sharing the
byte that one predicts and the next starts from. Batches of a task are drawn from their seed and index alone; those
of evaluations from a seed that no run can have.
"""

import functools
import hashlib
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from experiments.config import Run, task_of
from experiments.tasks import Task

STDLIB = "stdlib"
# What is not the library's own source, or differs between two machines with the same Python.
_FOLDERS_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_PREFIXES_LEFT_OUT = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


class Corpus(NamedTuple):
    """A text and what identifies it.

    Attributes:
        tokens: all bytes, files in order of their relative path, one after the other.
        files: how many files.
        hash: sha256 over relative paths, sizes and contents; losses compare only where it is equal.
    """

    tokens: np.ndarray
    files: int
    hash: str


class Splits(NamedTuple):
    """Training and held-out bytes of a corpus, without overlap."""

    training: np.ndarray
    validation: np.ndarray


def corpus(source: str) -> Corpus:
    """The text at `source`: `stdlib`, a file, or a folder (all its files but hidden ones), read once a process.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: there is no byte in it.
    """
    return _read(STDLIB if source == STDLIB else str(Path(source).expanduser().resolve()), source)


@functools.lru_cache(maxsize=4)
def _read(place: str, source: str) -> Corpus:
    if place == STDLIB:
        root, files = Path(sysconfig.get_path("stdlib")), _stdlib_files()
    else:
        root, files = _text_files(Path(place), source)
    digest, contents = hashlib.sha256(), []
    for relative in files:
        content = (root / relative).read_bytes()
        digest.update(f"{relative}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
        contents.append(content)
    tokens = np.frombuffer(b"".join(contents), np.uint8)
    if not tokens.size:
        raise ValueError(f"data.source is {source!r}: {len(files)} files and not one byte; expected text")
    return Corpus(tokens, len(files), digest.hexdigest())


def _stdlib_files() -> list[str]:
    return sorted(
        relative
        for relative in _walk(Path(sysconfig.get_path("stdlib")), _FOLDERS_LEFT_OUT)
        if relative.endswith(".py") and not any(part.startswith(_PREFIXES_LEFT_OUT) for part in relative.split("/"))
    )


def _text_files(place: Path, source: str) -> tuple[Path, list[str]]:
    if place.is_file():
        return place.parent, [place.name]
    if not place.is_dir():
        raise FileNotFoundError(f"data.source is {source!r}: no such file or folder; expected one, or {STDLIB!r}")
    return place, sorted(relative for relative in _walk(place, frozenset()) if Path(relative).name[0] != ".")


def _walk(root: Path, left_out: frozenset[str]):
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and name[0] != "."]
        for name in files:
            if (path := Path(folder, name)).is_file():  # not a socket, nor a link to nowhere
                yield path.relative_to(root).as_posix()


def splits(run: Run) -> Splits:
    """The training and held-out bytes of a run.

    Raises:
        FileNotFoundError: the corpus is missing.
        ValueError: the corpus is empty, or a side of the split holds no window of `context` + 1 bytes.
    """
    tokens, window = corpus(run.data.source).tokens, run.model.context + 1
    held_out = int(len(tokens) * run.data.validation_share)
    sides = Splits(tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :])
    for name, side in zip(("training", "held-out"), sides, strict=True):
        if len(side) < window:
            raise ValueError(
                f"data.source is {run.data.source!r}, of {len(tokens)} bytes: its {name} part has {len(side)} at "
                f"data.validation_share = {run.data.validation_share}, expected at least context + 1 = {window}; "
                f"give a longer text, a smaller model.context or another share"
            )
    return sides


class _Windows:
    """Sequence i of a text: bytes [i T, i T + T]."""

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        start = int(index) * self.context
        return {"tokens": self.tokens[start : start + self.context + 1]}

    def __repr__(self) -> str:
        return f"Windows({len(self)} of {self.context})"


HELD_OUT = 2**32
"""The seed of a task's evaluations; those of runs are smaller."""


class _Drawn:
    """Batch i of a task: what the generator of (seed, i) draws."""

    def __init__(self, task: Task, seed: int, batch: int):
        self.task, self.seed, self.batch = task, seed, batch

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        examples = self.task.draw(np.random.default_rng([self.seed, int(index)]), self.batch)
        return examples._asdict()

    def __repr__(self) -> str:
        return f"Drawn({self.task}, seed={self.seed}, batch={self.batch})"


def training_dataset(run: Run) -> grain.MapDataset:
    """Batch i of a run: endless, of text shuffled by `run.seed` anew in each epoch, or drawn from it.

    {"tokens": uint8 `B T+1`} for text; for a task {"tokens": uint16 `B T+1`, "counts": bool `B T`}.
    """
    task = task_of(run)
    if task is not None:
        return grain.MapDataset.source(_Drawn(task, run.seed, run.data.batch))
    windows = grain.MapDataset.source(_Windows(splits(run).training, run.model.context))
    return windows.seed(run.seed).shuffle().repeat().batch(run.data.batch)


def training_batches(run: Run) -> grain.DatasetIterator:
    """The batches of a run in order, as an iterator whose position can be saved and set."""
    # A batch is a few microseconds of copying: reader threads would cost more than they hide.
    return iter(training_dataset(run).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def validation_batches(run: Run) -> list[dict[str, np.ndarray]]:
    """`evaluate_batches` batches of windows spread evenly over the held-out bytes, or of a task; equal for all seeds.

    Windows overlap where the held-out text is shorter than all of them together.
    """
    task = task_of(run)
    if task is not None:
        drawn = _Drawn(task, HELD_OUT, run.data.batch)
        return [drawn[i] for i in range(run.evaluate_batches)]
    held_out, window = splits(run).validation, run.model.context + 1
    count = run.evaluate_batches * run.data.batch
    starts = np.linspace(0, len(held_out) - window, count).astype(int)
    windows = np.stack([held_out[start : start + window] for start in starts])
    return [{"tokens": batch} for batch in windows.reshape(run.evaluate_batches, run.data.batch, window)]
