"""Evaluates a run with other methods, temperatures and lengths: `python -m experiments.evaluate runs/run --help`.

What was trained with one method and temperature is asked for its loss with others: how much a method costs where it was
not trained, and whether another temperature wins that back. Writes results.json and a figure, as SVG and PNG.

Exit codes: 0 finished, 2 a wrong option or input.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

import attention
from experiments.checks import check_run
from experiments.cli import exit_code
from experiments.config import Run, to_dict
from experiments.data import validation_batches
from experiments.drawing import drawn
from experiments.evaluation_figures import figure, table
from experiments.files import write_bytes, write_json
from experiments.levers import levers
from experiments.points import static_part
from experiments.runtime import compiler_options, environment, start_process
from experiments.saved import Saved, load, load_run
from experiments.steps import TrainState, make_evaluate

OWN = "as trained"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional]
    """The folder of a run, which holds its config.json and its checkpoints."""
    methods: tuple[str, ...] = ()
    """Attention methods, each for every layer, such as 'TopK(k=16)'; the run's own comes first."""
    temperatures: tuple[float, ...] = (0.5, 0.7071, 1.0, 1.4142, 2.0)
    """Temperatures as multiples of that of the run's evaluations. Traced: a method is one program a length."""
    contexts: tuple[int, ...] = ()
    """Lengths of the sequences; that of the training if none is given."""
    batches: int = 8
    """Held-out batches a length."""
    out: Path | None = None
    """Folder for results.json, evaluate.svg and evaluate.png; `evaluate` in the run's folder if not given."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace results that are there."""


def evaluated(options: Options) -> list[dict[str, Any]]:
    """The loss at every method, context and temperature.

    Raises:
        ValueError: there is no such run or method, or a number is out of range.
        UnsupportedError: a method cannot be causal.
    """
    methods = [None, *map(attention.parse_method, options.methods)]
    models = {OWN if method is None else repr(method): load(options.folder, method) for method in methods}
    contexts = options.contexts or (models[OWN].run.model.context,)
    batches = {context: held_out(models[OWN], context, options.batches) for context in contexts}
    factors = options.temperatures
    own_factors = tuple(dict.fromkeys((1.0, *factors)))  # changes are from the run at its own temperature
    rows = []
    console = Console(stderr=True)
    for context in track(contexts, "evaluating", console=console, disable=not console.is_terminal):
        own = dict(zip(own_factors, at_temperatures(models[OWN], batches[context], own_factors), strict=True))
        for name, saved in models.items():
            found = [own[x] for x in factors] if name == OWN else at_temperatures(saved, batches[context], factors)
            pairs = zip(factors, (_described(numbers, own[1.0]) for numbers in found), strict=True)
            rows += [{"method": name, "context": context, "temperature": factor, **row} for factor, row in pairs]
    return rows


def held_out(saved: Saved, context: int, count: int) -> list[dict[str, np.ndarray]]:
    """Held-out batches of sequences of this length; the fewer in a batch the longer they are.

    Raises:
        ValueError: the model has no positions for this length, or the text is too short for it.
    """
    run = saved.run
    if run.model.positions == "learned" and context > run.model.context:
        raise ValueError(f"context is {context}: learned positions end at the training's {run.model.context}")
    rows = max(1, run.data.batch * run.model.context // context)
    longer = dataclasses.replace(run.model, context=context)
    changed = dataclasses.replace(
        run, model=longer, data=dataclasses.replace(run.data, batch=rows), evaluate_batches=count
    )
    check_run(dataclasses.replace(changed, optimizer=dataclasses.replace(run.optimizer, accumulate=1)))
    return validation_batches(changed)


def at_temperatures(saved: Saved, batches: list[Any], temperatures: tuple[float, ...]) -> list[dict[str, np.ndarray]]:
    """Loss, and accuracy where there is one, of each batch, at multiples of the temperature."""
    numbers, compiled = levers(saved.run), _compiled(static_part(saved.run))
    state = TrainState(saved.parameters, saved.constants, None, jnp.int32(0))
    rows = []
    for factor in temperatures:
        if not factor > 0:
            raise ValueError(f"temperatures is {temperatures}: expected numbers greater than 0")
        at = numbers._replace(evaluate_temperature=numbers.evaluate_temperature * np.float32(factor))
        found = jax.device_get([compiled(state, batch, at) for batch in batches])
        rows.append({name: np.array([x[name] for x in found], np.float64) for name in found[0]})
    return rows


@functools.lru_cache(maxsize=16)
def _compiled(static: Run) -> Callable[..., dict[str, Any]]:
    """The evaluation that all runs share which differ in traced fields alone."""
    whole = make_evaluate(dataclasses.replace(static, probes=()))

    def evaluate(state, batch, numbers):  # what is not returned is not computed
        found = whole(state, batch, numbers)
        return {name: found[name] for name in ("loss", "accuracy") if name in found}

    return jax.jit(evaluate, compiler_options=compiler_options())


def _described(numbers: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over batches, and that of the change of the loss on the same batches with its standard error."""
    change = numbers["loss"] - before["loss"]
    error = change.std(ddof=1) / np.sqrt(len(change)) if len(change) > 1 else 0.0
    means = {name: float(x.mean()) for name, x in numbers.items()}
    return means | {"change": float(change.mean()), "standard_error": float(error)}


def written(options: Options, rows: list[dict[str, Any]]) -> Path:
    """Writes the results and their figure."""
    out = options.out or options.folder / "evaluate"
    out.mkdir(parents=True, exist_ok=True)
    asked = {name: list(getattr(options, name)) for name in ("methods", "temperatures", "contexts")}
    trained = to_dict(load_run(options.folder))
    trained.pop("folder")  # where it lay says nothing of it
    record = {**asked, "batches": options.batches, "run": trained, "rows": rows, **environment()}
    for kind, content in drawn(lambda results: figure(results["rows"]), record).items():
        write_bytes(out / f"evaluate.{kind}", content)
    write_json(out / "results.json", record)
    return out


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.evaluate", description=__doc__)
        out = options.out or options.folder / "evaluate"
        if (out / "results.json").exists() and not options.overwrite:
            raise ValueError(f"{out} holds results: choose another --out, or pass --overwrite to replace them")
        rows = evaluated(options)
        print(f"written: {written(options, rows)}/results.json, evaluate.svg, evaluate.png")
        Console().print(table(rows))

    start_process()
    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
