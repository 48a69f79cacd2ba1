"""Finished and unfinished runs read back from their folders, with the method they were trained with or another."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

import attention
from attention.registry import unknown
from experiments.checkpoint import Checkpoints
from experiments.checks import check_run
from experiments.config import Run
from experiments.levers import levers
from experiments.metrics import named_leaves
from experiments.steps import make_init


class Saved(NamedTuple):
    """A trained model.

    Attributes:
        run: its configuration, with the method that it now has.
        parameters, constants: what `nnx.merge(model_graph(run), parameters, constants)` takes.
        drawn: names of the arrays that are not from the checkpoint, since the method was not trained.
    """

    run: Run
    parameters: nnx.State
    constants: nnx.State
    drawn: tuple[str, ...]


def load_run(folder: Path) -> Run:
    """The configuration of the run in a folder.

    Raises:
        ValueError: the folder holds no run, or one with other fields.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: expected the folder of a run, such as runs/run")
    run = from_dict(Run(), json.loads(path.read_text(encoding="utf-8"))["config"])
    return dataclasses.replace(run, name=folder.resolve().name, folder=folder.resolve().parent)


def from_dict(like: Any, values: Mapping[str, Any]) -> Any:
    """What `experiments.config.to_dict` made these values of; fields that are missing are those of `like`.

    Raises:
        ValueError: there is no such field, or no such method.
    """
    fields = [field.name for field in dataclasses.fields(like)]
    for name in values:
        if name not in fields:
            raise ValueError(unknown(f"field of {type(like).__name__}", name, fields))
    return dataclasses.replace(like, **{name: _read(getattr(like, name), value) for name, value in values.items()})


def _read(like: Any, value: Any) -> Any:
    if isinstance(like, attention.Method):
        return attention.parse_method(value)
    if dataclasses.is_dataclass(like):
        return from_dict(like, value)
    return type(like)(value) if isinstance(like, tuple | Path) else value


def load(folder: Path, method: attention.Method | None = None) -> Saved:
    """The model of a run's newest checkpoint that can be read. Nothing in the folder is changed.

    Args:
        folder: that of the run.
        method: takes the place of the run's methods in every layer; what it has of its own, and the run had not, is
            drawn from the run's seed.

    Raises:
        ValueError: there is no run, or no checkpoint that can be read.
    """
    run = load_run(folder)
    check_run(run)
    trained = _newest(run, folder)
    if method is None:
        return Saved(run, trained.parameters, trained.constants, ())
    model = dataclasses.replace(run.model, layer_methods=())
    run = dataclasses.replace(run, attention=method, model=model)
    fresh = jax.jit(make_init(run))(levers(run))
    parameters, drawn = _adopted(fresh.parameters, trained.parameters)
    constants, more = _adopted(fresh.constants, trained.constants)
    return Saved(run, parameters, constants, drawn + more)


def _newest(run: Run, folder: Path) -> Any:
    messages: list[str] = []
    like = jax.jit(make_init(run)).eval_shape(levers(run))
    path = folder / "checkpoints"
    state = None
    if path.is_dir():
        checkpoints = Checkpoints(path, messages.append)
        try:
            state = checkpoints.read(like)
        finally:
            checkpoints.close()
    if state is None:
        raise ValueError("; ".join([f"{folder} has no checkpoint that can be read: train the run first", *messages]))
    return state


def _adopted(fresh: nnx.State, trained: nnx.State) -> tuple[nnx.State, tuple[str, ...]]:
    """The leaves of `trained` where it has one of the same name and shape, else those of `fresh`, and their names."""
    known = named_leaves(trained)
    chosen, drawn = [], []
    for name, leaf in named_leaves(fresh).items():
        same = name in known and known[name].shape == leaf.shape
        chosen.append(known[name] if same else leaf)
        drawn += [] if same else [name]
    return jax.tree.unflatten(jax.tree.structure(fresh), chosen), tuple(drawn)
