"""Trains points with one compiled program: one after the other, or side by side as a vmapped population."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.config import Run
from experiments.data import training_batches, validation_batches
from experiments.levers import levers
from experiments.metrics import evaluation_fields
from experiments.programs import Program

Observer = Callable[["Progress"], None]


class Progress(NamedTuple):
    """Where the runs that are being trained stand: steps done, and the last validation loss of each."""

    steps: int
    losses: Sequence[float]
    seconds_per_step: float


class _History:
    """What one run has shown so far."""

    def __init__(self, names: list[str]):
        self.names = names
        self.losses: list[float] = []
        self.evaluations: list[dict[str, Any]] = []
        self.diverged_at: int | None = None
        self.diverged_in: str | None = None

    def add_steps(self, losses: np.ndarray, nonfinite: np.ndarray) -> None:
        for loss, tensor in zip(losses.tolist(), nonfinite.tolist(), strict=True):
            if self.diverged_at is not None:
                return
            if tensor >= 0:
                self.diverged_at, self.diverged_in = len(self.losses), self.names[tensor]
            else:
                self.losses.append(loss)

    def add_evaluation(self, step: int, loss: float, heads: dict[str, np.ndarray]) -> None:
        if self.diverged_at is not None:
            return
        if not math.isfinite(loss):
            self.diverged_at, self.diverged_in = step, "validation loss"
            return
        self.evaluations.append({"step": step, "loss": loss, **evaluation_fields(loss, heads)})

    def last_loss(self) -> float:
        return self.evaluations[-1]["loss"] if self.evaluations and self.diverged_at is None else math.nan


def train_together(program: Program, runs: Sequence[Run], observe: Observer) -> list[dict[str, Any]]:
    """Trains one run in each lane of the program.

    Args:
        program: compiled for the static part of all runs.
        runs: as many as the program has lanes, or one.
        observe: called after each step; what it raises ends the training.

    Returns:
        For each run the `steps` taken, its `losses` by step, its `evaluations`, where and in what it diverged (a
        run that did is not trained further), and its timings.
    """
    seeds = {run.seed: training_batches(run) for run in runs}
    knobs = program.joined([levers(run) for run in runs])
    state = program.init(knobs)
    held_out = validation_batches(runs[0])
    histories = [_History(program.suspects) for _ in runs]
    _evaluate(program, state, held_out, knobs, histories, 0)
    segments: list[float] = []
    waiting: list[Any] = []
    start = began = time.perf_counter()
    for step in range(1, program.run.steps + 1):
        batches = {seed: next(batches) for seed, batches in seeds.items()}
        state, metrics = program.step(state, program.joined([batches[run.seed] for run in runs]), knobs)
        waiting.append((metrics["loss"], metrics["nonfinite"]))
        if step % program.run.evaluate_every == 0 or step == program.run.steps:
            _collect(program, waiting, histories)
            segments.append((time.perf_counter() - start) / len(waiting) / len(runs))
            waiting = []
            _evaluate(program, state, held_out, knobs, histories, step)
            start = time.perf_counter()
        pace = statistics.median(segments) if segments else math.nan
        observe(Progress(step, [history.last_loss() for history in histories], pace))
        if all(history.diverged_at is not None for history in histories):
            break
    timings = {"seconds": time.perf_counter() - began, "seconds_per_step": statistics.median(segments)}
    return [_outcome(history, step, timings) for history in histories]


def _collect(program: Program, waiting: list[Any], histories: list[_History]) -> None:
    # Fetched together, so that the host does not wait for the device in every step.
    fetched = [[program.by_lane(x) for x in metrics] for metrics in jax.device_get(waiting)]
    losses, nonfinite = (np.stack(series) for series in zip(*fetched, strict=True))
    for lane, history in enumerate(histories):
        history.add_steps(losses[:, lane], nonfinite[:, lane])


def _evaluate(program: Program, state, held_out, knobs, histories: list[_History], step: int) -> None:
    metrics = jax.device_get([program.evaluate(state, batch, knobs) for batch in held_out])
    names = metrics[0]
    means = {name: np.mean([program.by_lane(m[name]).astype(np.float64) for m in metrics], axis=0) for name in names}
    losses = means.pop("loss")
    for lane, history in enumerate(histories):
        history.add_evaluation(step, float(losses[lane]), {name: x[lane] for name, x in means.items()})


def _outcome(history: _History, steps: int, timings: dict[str, float]) -> dict[str, Any]:
    return {
        "steps": steps,
        "losses": history.losses,
        "evaluations": history.evaluations,
        "diverged_at": history.diverged_at,
        "diverged_in": history.diverged_in,
        "timings": timings,
    }
