"""Saves what a run attends with: `python -m experiments.capture runs/run --out FILE.safetensors`.

The queries, keys and values of every layer, and what their products are multiplied by, on held-out sequences, for
`python -m experiments.benchmark temperature --operands FILE.safetensors`, `certified` and `coverage`.

Exit codes: 0 finished, 2 a wrong option or input.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from flax import nnx

from experiments.cli import exit_code
from experiments.evaluate import held_out
from experiments.levers import evaluation_numbers, levers
from experiments.operand_files import Layer, save
from experiments.runtime import compiler_options, start_process
from experiments.saved import Saved, load
from experiments.steps import model_graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional]
    """The folder of a run, which holds its config.json and its checkpoints."""
    out: Path
    """The file to write."""
    context: int | None = None
    """Tokens of a sequence; as many as in training if not given."""
    sequences: int = 1
    """Held-out sequences."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the file if it is there."""


def captured(saved: Saved, tokens: np.ndarray) -> list[Layer]:
    """What each layer attends with on tokens `B T`, with the numbers of the run's evaluations.

    Raises:
        ValueError: the run has a soft cap, so that its logits are no products of queries and keys.
    """
    run = saved.run
    if run.soft_cap is not None:
        raise ValueError(f"soft_cap is {run.soft_cap}: what is read from the file would be attended to without it")
    model = nnx.merge(model_graph(run), saved.parameters, saved.constants)
    numbers = evaluation_numbers(run, levers(run))
    look = jax.jit(
        lambda tokens: model.observed(tokens, adaptive=run.adaptive, **numbers)[1], compiler_options=compiler_options()
    )
    layers = []
    for attended, block in zip(look(tokens), model.blocks, strict=True):
        query, key, value = (np.asarray(x, np.float32) for x in attended)
        scale = block.attention.scale[...] if numbers["scale"] is None else numbers["scale"]
        beta = np.broadcast_to(np.asarray(scale / numbers["temperature"]), query.shape[2])
        layers.append(Layer(query=query, key=key, value=value, beta=beta))
    return layers


def write(options: Options) -> None:
    """Captures and writes.

    Raises:
        ValueError: there is no such run, it has a soft cap or too little text, or the file is there.
    """
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"out is {options.out}, which is there: choose another, or pass --overwrite to replace it")
    saved = load(options.folder)
    context = options.context or saved.run.model.context
    rows = [row for batch in held_out(saved, context, options.sequences) for row in batch["tokens"]]
    tokens = np.stack(rows[: options.sequences])[:, :-1]
    about = f"{saved.run.name} after {saved.run.steps} steps, {context} tokens, causal"
    save(options.out, captured(saved, tokens), about)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.capture", description=__doc__)
        write(options)
        print(f"written: {options.out}")

    start_process()
    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
