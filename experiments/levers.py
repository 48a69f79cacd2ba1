"""The traced axes of an experiment: what a compiled step takes as arguments, and what the model's calls take of it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention import SCALE_RULES, yarn_factor
from experiments.config import Run, starting_scale


class Levers(NamedTuple):
    """The traced axes of an experiment, each of shape `()`, or `(P,)` for a population of P; no cap is None."""

    scale: Float[Array, "..."]
    temperature: Float[Array, "..."]
    evaluate_temperature: Float[Array, "..."]
    soft_cap: Float[Array, "..."] | None
    learning_rate: Float[Array, "..."]
    seed: Int[Array, "..."]


def levers(run: Run) -> Levers:
    """The traced axes of a run. YaRN's factor, 1 where nothing is stretched, divides the temperatures."""
    later = run.temperature if run.evaluate_temperature is None else run.evaluate_temperature
    factor = yarn_factor(run.stretch)
    return Levers(
        scale=jnp.asarray(starting_scale(run), jnp.float32),
        temperature=jnp.asarray(run.temperature / factor, jnp.float32),
        evaluate_temperature=jnp.asarray(later / factor, jnp.float32),
        soft_cap=None if run.soft_cap is None else jnp.asarray(run.soft_cap, jnp.float32),
        learning_rate=jnp.asarray(run.optimizer.learning_rate, jnp.float32),
        seed=jnp.asarray(run.seed, jnp.uint32),
    )


def training_numbers(run: Run, levers: Levers) -> dict[str, Any]:
    """What the model's calls take in training. Learned scales are the layers' own: `levers.scale` is their start."""
    scale = None if SCALE_RULES[run.model.scale_rule].learned else levers.scale
    return {"scale": scale, "temperature": levers.temperature, "logits_soft_cap": levers.soft_cap}


def evaluation_numbers(run: Run, levers: Levers) -> dict[str, Any]:
    """What the model's calls take in evaluations, `adaptive` apart."""
    return training_numbers(run, levers) | {"temperature": levers.evaluate_temperature}
