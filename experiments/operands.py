"""Queries, keys and values to measure methods on: random ones, and those of a trained model."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments import steps
from experiments.config import Data, Model, Run
from experiments.data import training_batches, validation_batches
from experiments.levers import levers, training_numbers


class Operands(NamedTuple):
    """Queries `B T N H`, keys and values `B S K H`, where they come from, and whether they are attended to causally."""

    name: str
    query: Any
    key: Any
    value: Any
    causal: bool = False


def normal(T: int, H: int, seed: int) -> Operands:
    """One head of independent standard normal operands."""
    draw = np.random.default_rng(seed).standard_normal((3, 1, T, 1, H)).astype(np.float32)
    return Operands(f"standard normal, {T} keys", *draw)


def trained(context: int, count: int, seed: int) -> Operands:
    """The operands in every layer of a small language model, trained for `count` steps on text it then continues.

    Layers stand along the batch axis.
    """
    run = Run(model=Model(context=context), data=Data(batch=2), steps=count, seed=seed)
    numbers = levers(run)
    step = jax.jit(steps.make_step(run), donate_argnums=0)
    state = jax.jit(steps.make_init(run))(numbers)
    batches = iter(training_batches(run))
    for _ in range(count):
        state, _ = step(state, next(batches), numbers)
    model = nnx.merge(steps.model_graph(run), state.parameters, state.constants)
    text = next(iter(validation_batches(run)))["tokens"][:1, :-1]
    _, layers = model.observed(text, **training_numbers(run, numbers))
    query, key, value = (np.concatenate(x) for x in zip(*layers, strict=True))
    return Operands(f"a model after {count} steps, {context} tokens, causal", query, key, value, causal=True)
