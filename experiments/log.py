"""What a run writes down: metrics by step, without a clock; timings apart; TensorBoard events."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member] (made at run time)
from tensorboardX.summary import scalar

from experiments.files import append_json_lines, cut_json_lines
from experiments.folder import RunFolder
from experiments.metrics import evaluation_fields

Record = dict[str, Any]
STEP_METRICS = ("loss", "grad_norm", "learning_rate")
_NAMES = {"loss": "validation loss", "entropy": "attention entropy"}


class NonFiniteError(FloatingPointError):
    """A loss, gradient or parameter became NaN or Inf; the message names the step and the tensor."""


class Log:
    """The logs of a run, cut back to `step`, after which the process goes on.

    Everything is written in the calling thread, so that a full disk is an error here and now.
    """

    def __init__(self, folder: RunFolder, step: int):
        self._folder, self._started = folder, time.monotonic()
        for path in (folder.metrics, folder.timings):
            cut_json_lines(path, step)
        folder.tensorboard.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder.tensorboard / "events"))
        # Tells TensorBoard to forget what an earlier process wrote for later steps.
        self._event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, records: list[Record]) -> None:
        """Appends records; each holds its `step`."""
        append_json_lines(self._folder.metrics, records)
        seconds = round(time.monotonic() - self._started, 3)
        append_json_lines(
            self._folder.timings, [{"step": record["step"], "seconds": seconds} for record in records[-1:]]
        )
        for record in records:
            for tag, number in _scalars(record):
                self._event(Event(step=record["step"], summary=scalar(tag, number)))
        self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()

    def _event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)


def _scalars(record: Record) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, list):  # layers x heads
            for layer, heads in enumerate(value):
                yield from ((f"{name}/layer{layer}/head{head}", number) for head, number in enumerate(heads))
        elif name != "step":
            yield name, value


class Pending:
    """Metrics of steps that are still on the device; fetching a few at a time spares each step a wait.

    Args:
        names: what the `nonfinite` metric counts.
    """

    def __init__(self, names: list[str]):
        self._names, self._waiting = names, []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Notes the metrics of a step without waiting for them."""
        self._waiting.append((step, metrics))

    def fetch(self) -> list[Record]:
        """The records of all steps since the last call.

        Raises:
            NonFiniteError: something in one of the steps was NaN or Inf.
        """
        waiting, self._waiting = jax.device_get(self._waiting), []
        records = []
        for step, metrics in waiting:
            index = int(metrics.pop("nonfinite"))
            if index >= 0:
                raise NonFiniteError(f"step {step}: {self._names[index]} is not finite")
            records.append({"step": step, **{name: float(metrics[name]) for name in STEP_METRICS}})
        return records


def evaluation_record(step: int, evaluations: list[dict[str, jax.Array]]) -> Record:
    """The mean of several batches' evaluations.

    Raises:
        NonFiniteError: it is NaN or Inf.
    """
    fetched = jax.device_get(evaluations)
    names = fetched[0]
    means = {name: np.asarray(np.mean([x[name] for x in fetched], axis=0, dtype=np.float64)) for name in names}
    for name, value in means.items():
        if not np.all(np.isfinite(value)):
            raise NonFiniteError(f"step {step}: {_NAMES.get(name, name)} is not finite")
    loss = float(means.pop("loss"))
    return {"step": step, "validation_loss": loss, **evaluation_fields(loss, means)}


def told(record: Record) -> str:
    """What a record of an evaluation, or a result, says of the model: its bits a byte, or its accuracy."""
    if "accuracy" in record:
        return f"accuracy {record['accuracy']:.4f}"
    return f"{record['bits_per_byte']:.4f} bits per byte"
