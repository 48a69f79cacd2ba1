"""One training run as pure functions: initial state, step, evaluation.

They are functions of arrays alone. Scale, temperature, learning rate and seed are arguments (`Levers`), so
that all points of a sweep over them share one compilation; `jax.vmap` over states, batches and levers trains
a population.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from attention.flax import Constant
from experiments.config import Run, check_run, layer_methods
from experiments.metrics import attention_diagnostics, cross_entropy, first_nonfinite, suspects
from experiments.model import LanguageModel
from experiments.optimizer import descent, unit_schedule

Batch = Any  # {"tokens": integers `B T+1`}
Metrics = dict[str, Array]


class Levers(NamedTuple):
    """The traced axes of an experiment, each of shape `()`, or `(P,)` for a population of P."""

    scale: Float[Array, "..."]
    temperature: Float[Array, "..."]
    learning_rate: Float[Array, "..."]
    seed: Int[Array, "..."]


class TrainState(NamedTuple):
    """Everything that a step reads and writes."""

    parameters: nnx.State
    constants: nnx.State
    optimizer: Any
    step: Int[Array, ""]


def levers(run: Run) -> Levers:
    """The traced axes of a run; a scale of None is 1 / sqrt(head size)."""
    scale = 1 / np.sqrt(run.model.width // run.model.heads) if run.scale is None else run.scale
    return Levers(
        scale=jnp.asarray(scale, jnp.float32),
        temperature=jnp.asarray(run.temperature, jnp.float32),
        learning_rate=jnp.asarray(run.optimizer.learning_rate, jnp.float32),
        seed=jnp.asarray(run.seed, jnp.uint32),
    )


def make_init(run: Run) -> Callable[[Levers], TrainState]:
    """The function that draws a run's initial state from `levers.seed`."""
    check_run(run)

    def init(levers: Levers) -> TrainState:
        model = _model(run, jax.random.key(levers.seed))
        _, parameters, constants = nnx.split(model, nnx.Param, Constant)
        optimizer = descent(run.optimizer).init(parameters)
        return TrainState(parameters, constants, optimizer, jnp.zeros((), jnp.int32))

    return init


def make_step(run: Run) -> Callable[[TrainState, Batch, Levers], tuple[TrainState, Metrics]]:
    """The function that takes one optimizer step.

    Its metrics are scalars: `loss` (nats per byte, before the step), `grad_norm` (before clipping),
    `learning_rate`, and `nonfinite`, an index into `nonfinite_names(run)`, -1 while all is well.
    Callers jit it with `donate_argnums=0`.
    """
    loss_and_gradient = jax.value_and_grad(_make_loss(run))

    def step(state: TrainState, batch: Batch, levers: Levers) -> tuple[TrainState, Metrics]:
        tokens = batch["tokens"]
        micro = tokens.reshape(run.optimizer.accumulate, -1, tokens.shape[-1])
        loss, gradients = _mean_over(
            lambda tokens: loss_and_gradient(state.parameters, state.constants, tokens, levers), micro
        )
        rate = levers.learning_rate * unit_schedule(run.optimizer, run.steps, state.step)
        updates, optimizer = descent(run.optimizer).update(gradients, state.optimizer, state.parameters)
        parameters = jax.tree.map(lambda p, u: p + rate * u, state.parameters, updates)
        norm = optax.tree.norm(gradients)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "nonfinite": first_nonfinite(suspects(loss, gradients, norm, parameters)),
        }
        return TrainState(parameters, state.constants, optimizer, state.step + 1), metrics

    return step


def make_evaluate(run: Run) -> Callable[[TrainState, Batch, Levers], Metrics]:
    """The function that gives a batch's mean `loss` in nats per byte, and the numbers of `attention.Diagnostics`.

    These are layers x heads, of the sequences that `attention_diagnostics` looks at.
    """
    graph = model_graph(run)

    def evaluate(state: TrainState, batch: Batch, levers: Levers) -> Metrics:
        model = nnx.merge(graph, state.parameters, state.constants)
        numbers = {"scale": levers.scale, "temperature": levers.temperature}
        logits, seen = model.observed(batch["tokens"][:, :-1], **numbers)
        layers = [
            (*pair, block.attention.method, block.attention.params())
            for block, pair in zip(model.blocks, seen, strict=True)
        ]
        return {"loss": cross_entropy(logits, batch["tokens"][:, 1:]), **attention_diagnostics(layers, **numbers)}

    return evaluate


def model_graph(run: Run) -> nnx.GraphDef:
    """The static part of the model: `nnx.merge` it with a state's parameters and constants."""
    return nnx.split(_abstract_model(run), nnx.Param, Constant)[0]


def nonfinite_names(run: Run) -> list[str]:
    """The names of the tensors that the `nonfinite` metric counts."""
    parameters = nnx.state(_abstract_model(run), nnx.Param)
    return list(suspects(None, parameters, None, parameters))


def _make_loss(run: Run):
    graph = model_graph(run)

    def loss(parameters, constants, tokens, levers: Levers) -> Float[Array, ""]:
        model = nnx.merge(graph, parameters, constants)
        logits = model(tokens[:, :-1], scale=levers.scale, temperature=levers.temperature)
        return cross_entropy(logits, tokens[:, 1:])

    return loss


def _mean_over(f, micro_batches):
    """The mean of f over micro-batches, one at a time, so that memory is that of one."""
    if micro_batches.shape[0] == 1:
        return f(micro_batches[0])

    def add(total, tokens):
        return jax.tree.map(jnp.add, total, f(tokens)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, micro_batches[0]))
    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return jax.tree.map(lambda x: x / micro_batches.shape[0], total)


def _model(run: Run, key) -> LanguageModel:
    return LanguageModel(run.model, layer_methods(run), nnx.Rngs(params=key))


def _abstract_model(run: Run) -> LanguageModel:
    check_run(run)
    return nnx.eval_shape(lambda: _model(run, jax.random.key(0)))
