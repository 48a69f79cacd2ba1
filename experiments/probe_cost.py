"""What probes cost: the time of evaluations with them and without, as a share of the training between two of them."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from experiments import throughput
from experiments.config import Data, Model, Run
from experiments.drawing import COLOURS, level
from experiments.levers import levers
from experiments.runtime import compiler_options
from experiments.steps import make_evaluate, make_init, make_step
from experiments.timing import interleaved, spread

MODELS = {"default": (Model(), Data().batch), "throughput": (throughput.MODEL, 16)}
ALLOWED = 0.1
"""The share that probes are to stay below."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probes:
    """Cost of the numbers of attention and of probing methods, at the default interval between evaluations."""

    models: tuple[str, ...] = tuple(MODELS)
    """`default`, that of a run without options; `throughput`, that of the benchmark of this name."""
    methods: tuple[str, ...] = ("TopK(k=16)", "Performer(features=64)", "Taylor")
    """What is probed."""
    rounds: int = 15
    """Turns of each contestant."""
    seconds: float = 20.0
    """Of a model, after which no more turns begin; there are at least 3."""
    out: Path = Path("runs/benchmark/probes")
    """Folder for results.json, probes.svg and probes.png."""

    def measured(self) -> list[dict[str, Any]]:
        """One row a model: seconds, and shares of the time of the steps between two evaluations."""
        return [self._of(name, *MODELS[name]) for name in self.models]

    def _of(self, name: str, model: Model, batch: int) -> dict[str, Any]:
        run = Run(model=model, data=Data(batch=batch), probes=self.methods)
        seconds = interleaved(_contestants(run), self.rounds, self.seconds)
        step, loss, looked, tried = (np.asarray(seconds[kind]) for kind in ("step", "loss", "numbers", "probes"))
        share = run.evaluate_batches / (run.evaluate_every * step)
        return {
            "model": name,
            "methods": list(self.methods),
            "seconds": {kind: spread(times) for kind, times in seconds.items()},
            "share_of_numbers": spread((looked - loss) * share),
            "share_of_probes": spread((tried - looked) * share),
            "share_of_both": spread((tried - loss) * share),
        }


def _contestants(run: Run) -> dict[str, Callable[[], Any]]:
    """A step, and the evaluation of a batch: its loss alone, with the numbers of attention, and with probes, too."""
    tokens = np.random.default_rng(0).integers(0, 256, (run.data.batch, run.model.context + 1), np.uint8)
    batch, numbers, options = {"tokens": tokens}, levers(run), compiler_options()
    init, plain = jax.jit(make_init(run)), make_evaluate(dataclasses.replace(run, probes=()))
    step = jax.jit(make_step(run), donate_argnums=0, compiler_options=options)
    trained, state = [init(numbers)], init(numbers)

    def train() -> None:
        trained[0], metrics = step(trained[0], batch, numbers)
        jax.block_until_ready(metrics)

    looks = {
        "loss": lambda *arguments: plain(*arguments)["loss"],  # what is not returned is not computed
        "numbers": plain,
        "probes": make_evaluate(run),
    }
    calls: dict[str, Callable[[], Any]] = {"step": train}
    for kind, look in looks.items():
        compiled = jax.jit(look, compiler_options=options)
        calls[kind] = functools.partial(_waited, compiled, state, batch, numbers)
    return calls


def _waited(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.block_until_ready(function(*arguments))


def figure(results: list[dict[str, Any]]) -> Figure:
    """Bars of both shares, a group a model, below the share that is allowed; whiskers span the quartiles."""
    drawing = Figure(figsize=(6.0, 3.2), layout="constrained")
    panel = drawing.subplots()
    kinds = {"share_of_numbers": "numbers of attention", "share_of_probes": "probes", "share_of_both": "both"}
    for index, (kind, label) in enumerate(kinds.items()):
        middle = [row[kind]["median"] for row in results]
        spans = [
            [row[kind]["median"] - row[kind]["lower_quartile"] for row in results],
            [row[kind]["upper_quartile"] - row[kind]["median"] for row in results],
        ]
        places = np.arange(len(results)) + 0.27 * (index - 1)
        panel.bar(places, middle, 0.25, yerr=spans, color=COLOURS[index], capsize=3, label=label)
    level(panel, ALLOWED, "--", "allowed")
    panel.set_xticks(range(len(results)), [row["model"] for row in results])
    panel.set_ylabel("share of the time of training")
    panel.spines[["top", "right"]].set_visible(False)
    drawing.legend(loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=8)
    return drawing


def table(results: list[dict[str, Any]]) -> Table:
    """The same numbers for a terminal."""
    shown = Table("model", "step, ms", "evaluation, ms", "with numbers", "with probes", "share of both")
    for row in results:
        times = (f"{1e3 * row['seconds'][kind]['median']:.1f}" for kind in ("step", "loss", "numbers", "probes"))
        shown.add_row(row["model"], *times, f"{row['share_of_both']['median']:.3f}")
    return shown
