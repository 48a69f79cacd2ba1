"""Trains one language model: `python -m experiments.train --help`.

A run lives in `<folder>/<name>/`: `config.json`, `metrics.jsonl`, `timings.jsonl`, `tensorboard/`,
`checkpoints/`, and at the end `result.json`. Started again with the same options it goes on from its last
checkpoint, and its metrics and parameters are bit for bit those of a run that never stopped.

Exit codes: 0 finished, 1 a number stopped being finite or the disk is full, 2 a wrong option, 130 and 143
stopped by SIGINT and SIGTERM with everything saved.
"""

import dataclasses
import errno
import sys
from collections.abc import Callable
from typing import Annotated, Any

import grain
import jax
import tyro

from experiments.checkpoint import Checkpoints
from experiments.checks import check_name, check_run
from experiments.cli import exit_code, parse
from experiments.config import Run
from experiments.data import training_batches, validation_batches
from experiments.files import is_disk_full, read_json_lines
from experiments.folder import RunFolder, open_folder
from experiments.levers import Levers, levers
from experiments.log import Log, Pending, evaluation_record, told
from experiments.progress import View
from experiments.runtime import Interrupted, StopSignals, compiler_options, start_process
from experiments.steps import TrainState, make_evaluate, make_init, make_step, nonfinite_names

Options = Annotated[Run, tyro.conf.arg(name="")]  # `--steps`, not `--run.steps`
FETCH_EVERY = 16  # steps between waits for the device


def train(run: Run, *, overwrite: bool = False, view: Callable[[str, int, int], View] = View) -> dict[str, Any]:
    """Trains `run` in its folder, from its last checkpoint if it has one, and returns what `result.json` holds.

    Args:
        run: what to train.
        overwrite: replace a run of the same name.
        view: makes the progress view from the run's name, its steps, and the steps that are done.

    Raises:
        ValueError, FileNotFoundError: the configuration, the text or the name cannot be used; nothing is written.
        NonFiniteError: a loss, gradient or parameter became NaN or Inf. The last checkpoint is from before.
        Interrupted: SIGTERM or SIGINT; everything is saved.
        OSError: the disk is full. The last checkpoint is intact.
    """
    check_run(run)
    check_name(run.name)
    batches, held_out = training_batches(run), validation_batches(run)
    programs = _Programs.of(run)
    initial = programs.check(batches, held_out)
    try:
        folder = open_folder(run, overwrite=overwrite)
        if folder.result is not None:
            return folder.result
        with StopSignals() as signals:
            _run(run, folder, programs, initial, batches, held_out, signals, view)
            result = _result(run, folder, initial)
            folder.finish(result)
    except Exception as error:
        if is_disk_full(error):
            advice = "every finished checkpoint is intact: free some space and start again"
            raise OSError(errno.ENOSPC, f"no space left while writing to {run.folder / run.name}; {advice}") from error
        raise
    return result


@dataclasses.dataclass(frozen=True)
class _Programs:
    """The compiled functions of a run, and the numbers that they all take."""

    init: Any
    step: Any
    evaluate: Any
    levers: Levers

    @classmethod
    def of(cls, run: Run) -> "_Programs":
        options = compiler_options()
        step = jax.jit(make_step(run), donate_argnums=0, compiler_options=options)
        evaluate = jax.jit(make_evaluate(run), compiler_options=options)
        return cls(jax.jit(make_init(run)), step, evaluate, levers(run))

    def check(self, batches: grain.DatasetIterator, held_out: list[Any]) -> TrainState:
        """The shapes of the state; traces everything, so that a method refuses before a file is written."""
        state = self.init.eval_shape(self.levers)
        position = batches.get_state()
        self.step.eval_shape(state, next(batches), self.levers)
        batches.set_state(position)
        self.evaluate.eval_shape(state, held_out[0], self.levers)
        return state


def _run(run: Run, folder: RunFolder, programs: _Programs, initial, batches, held_out, signals, view) -> None:
    messages: list[str] = []
    checkpoints = Checkpoints(folder.checkpoints, messages.append)
    state = checkpoints.restore(initial, batches)
    start = 0 if state is None else int(state.step)
    if state is None:
        batches = training_batches(run)  # a checkpoint that failed half-way may have moved the iterator
        state = programs.init(programs.levers)
    if start or messages:
        messages.append(f"{folder.path}: goes on after step {start} of {run.steps}")
    log = Log(folder, start)
    try:
        with view(run.name, run.steps, start) as shown:
            for message in messages:
                shown.tell(message)
            _Session(run, programs, batches, held_out, log, checkpoints, shown, signals).loop(state, start)
    finally:
        log.close()
        checkpoints.close()


@dataclasses.dataclass
class _Session:
    """The parts of a run at work, and the loop over its steps."""

    run: Run
    programs: _Programs
    batches: grain.DatasetIterator
    held_out: list[dict[str, Any]]
    log: Log
    checkpoints: Checkpoints
    view: View
    signals: StopSignals

    def loop(self, state: TrainState, start: int) -> None:
        run, programs = self.run, self.programs
        pending = Pending(nonfinite_names(run))
        for step in range(start + 1, run.steps + 1):
            state, metrics = programs.step(state, next(self.batches), programs.levers)
            pending.add(step, metrics)
            stop = self.signals.received
            last = step == run.steps
            save_now = last or stop is not None or step % run.checkpoint_every == 0
            evaluate_now = last or step % run.evaluate_every == 0
            if save_now or evaluate_now or len(pending) >= FETCH_EVERY:
                self._write(pending)
            if evaluate_now:
                self._evaluate(step, state)
            if save_now:  # after the metrics of its step are on disk, none of them later than it
                self.checkpoints.save(step, state, self.batches)
            if stop is not None and not last:
                message = f"stopped by signal {stop} after step {step} of {run.steps}, saved; start again to go on"
                raise Interrupted(stop, message)

    def _write(self, pending: Pending) -> None:
        records = pending.fetch()
        self.log.write(records)
        self.view.step(records[-1]["step"], records[-1]["loss"])

    def _evaluate(self, step: int, state: TrainState) -> None:
        evaluate, numbers = self.programs.evaluate, self.programs.levers
        record = evaluation_record(step, [evaluate(state, batch, numbers) for batch in self.held_out])
        self.log.write([record])
        self.view.tell(f"step {step}: validation loss {record['validation_loss']:.4f} nats, {told(record)}")


def _result(run: Run, folder: RunFolder, initial: TrainState) -> dict[str, Any]:
    records = read_json_lines(folder.metrics)
    training = next(record for record in reversed(records) if "loss" in record)
    evaluation = next(record for record in reversed(records) if "validation_loss" in record)
    size = sum(leaf.size for leaf in jax.tree.leaves(initial.parameters))
    return {**folder.description, **training, **evaluation, "parameters": size}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command(
        run: Annotated[Run, tyro.conf.arg(name="")], overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    ) -> None:
        """Trains one language model in the folder of its run, or goes on with it.

        Args:
            run: What to train.
            overwrite: Replace the run of this name, whatever it is.
        """
        result = train(run, overwrite=overwrite)
        print(f"{run.folder / run.name}: {told(result)} after step {result['step']}")

    start_process()
    return exit_code(lambda: parse(command, arguments, prog="python -m experiments.train"))


if __name__ == "__main__":
    sys.exit(main())
