"""Checkpoints of a run: the state and the position in the data, verified when they are read."""

import errno
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import grain.checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.metrics import named_leaves

KEPT = 3


class Checkpoints:
    """The last three checkpoints of a run.

    A checkpoint is written beside its place and then put there, and only after that an older one is removed, so
    that a process killed at any moment, or a full disk, leaves the last good one.

    Args:
        path: their folder.
        tell: takes the message when a checkpoint cannot be read.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]):
        # Written before `save` returns: the next step's donated buffers would otherwise be read while reused.
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(path).absolute(), options=options)
        self._path, self._tell = path, tell

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Saves the state after `step` and the iterator's position, unless they are there already."""
        if step in self._manager.all_steps():
            return
        arrays = _arrays(state)
        # Asked before writing: orbax's threads say it too, but in tracebacks of their own. Twice the size of the
        # arrays leaves room for indexes and for the logs.
        if shutil.disk_usage(self._path).free < 2 * sum(x.nbytes for x in arrays.values()):
            raise OSError(errno.ENOSPC, f"no space left for checkpoint {step} in {self._path}")
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            data=grain.checkpoint.CheckpointSave(batches),
            digest=ocp.args.JsonSave({"sha256": _digest(arrays)}),
        )
        self._manager.save(step, args=args)

    def restore(self, like: Any, batches: grain.DatasetIterator) -> Any | None:
        """The newest state that can be read, with `batches` set to its position; None if there is none.

        A truncated or corrupt checkpoint is named, removed, and the one before it tried.

        Args:
            like: a state of the same structure, or its shapes and dtypes.
            batches: an iterator over the same data.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            state = self._tried(step, like, batches)
            if state is not None:
                return state
            self._manager.delete(step)
        return None

    def read(self, like: Any) -> Any | None:
        """The newest state that can be read; None if there is none. One that is damaged is named, and left there."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        states = (self._tried(step, like, None) for step in steps)
        return next((state for state in states if state is not None), None)

    def _tried(self, step: int, like: Any, batches: grain.DatasetIterator | None) -> Any | None:
        try:
            return self._read(step, like, batches)
        except Exception as error:  # whatever a damaged file makes a reader raise
            reason = (str(error).splitlines() or [""])[0][:200]
            self._tell(f"checkpoint {step} in {self._path} cannot be read ({type(error).__name__}: {reason})")
            return None

    def _read(self, step: int, like: Any, batches: grain.DatasetIterator | None) -> Any:
        shapes = jax.eval_shape(_arrays, like)
        parts = {"state": ocp.args.StandardRestore(shapes), "digest": ocp.args.JsonRestore()}
        if batches is not None:
            parts["data"] = grain.checkpoint.CheckpointRestore(batches)
        read = self._manager.restore(step, args=ocp.args.Composite(**parts))
        if _digest(read["state"]) != read["digest"]["sha256"]:
            raise ValueError("its arrays are not those that were saved")
        leaves = [_as_was(read["state"][name], leaf) for name, leaf in named_leaves(like).items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        """Releases what orbax holds."""
        self._manager.close()


def _arrays(state: Any) -> dict[str, jax.Array]:
    """The leaves of a state by name, random keys as the integers that they are made of."""
    return {name: jax.random.key_data(x) if _is_key(x) else x for name, x in named_leaves(state).items()}


def _as_was(x: jax.Array, like: Any) -> jax.Array:
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if _is_key(like) else x


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _digest(arrays: dict[str, jax.Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        x = np.asarray(arrays[name])
        digest.update(f"{name} {x.dtype} {x.shape}\0".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
