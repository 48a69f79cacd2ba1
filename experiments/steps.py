"""One training run as pure functions: initial state, step, evaluation.

They are functions of arrays alone. Scale, temperatures, soft cap, learning rate and seed are arguments
(`experiments.levers`), so that all points of a sweep over them share one compilation; `jax.vmap` over states, batches
and levers trains a population.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import attention
from attention.flax import Constant
from experiments.checks import check_run
from experiments.config import Run, layer_methods, vocabulary
from experiments.levers import Levers, evaluation_numbers, training_numbers
from experiments.metrics import accuracy, attention_diagnostics, cross_entropy, first_nonfinite, suspects
from experiments.model import LanguageModel
from experiments.optimizer import descent, unit_schedule
from experiments.probes import attention_errors

Batch = Any  # {"tokens": integers `B T+1`}, and where not every prediction counts {"counts": booleans `B T`}
Metrics = dict[str, Array]
DRAWS = 0x7D4A  # sets the key of redrawn constants apart from those of parameters, which flax numbers from 0


class TrainState(NamedTuple):
    """Everything that a step reads and writes."""

    parameters: nnx.State
    constants: nnx.State
    optimizer: Any
    step: Int[Array, ""]


def make_init(run: Run) -> Callable[[Levers], TrainState]:
    """The function that draws a run's initial state from `levers.seed`."""
    check_run(run)

    def init(levers: Levers) -> TrainState:
        model = _model(run, jax.random.key(levers.seed))
        for block in model.blocks:
            if isinstance(own := block.attention.scale, nnx.Variable):
                own[...] = jnp.full_like(own[...], levers.scale)
        _, parameters, constants = nnx.split(model, nnx.Param, Constant)
        optimizer = descent(run.optimizer).init(parameters)
        return TrainState(parameters, constants, optimizer, jnp.zeros((), jnp.int32))

    return init


def make_step(run: Run) -> Callable[[TrainState, Batch, Levers], tuple[TrainState, Metrics]]:
    """The function that takes one optimizer step.

    Its metrics are scalars: `loss` (nats per token, before the step), `grad_norm` (before clipping),
    `learning_rate`, and `nonfinite`, an index into `nonfinite_names(run)`, -1 while all is well.
    Callers jit it with `donate_argnums=0`.
    """
    loss_and_gradient = jax.value_and_grad(_make_loss(run))
    redrawn, renewed = _make_redraw(run), _make_renew(run)

    def step(state: TrainState, batch: Batch, levers: Levers) -> tuple[TrainState, Metrics]:
        constants = redrawn(state, levers)
        micro = jax.tree.map(lambda x: x.reshape(run.optimizer.accumulate, -1, x.shape[-1]), batch)
        loss, gradients = _mean_over(lambda part: loss_and_gradient(state.parameters, constants, part, levers), micro)
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
        return TrainState(parameters, renewed(parameters, constants), optimizer, state.step + 1), metrics

    return step


def _make_redraw(run: Run) -> Callable[[TrainState, Levers], nnx.State]:
    """The function that gives the constants of a step: drawn at the start of each period, by seed and step alone."""
    if not run.redraw_every:
        return lambda state, levers: state.constants
    graph = model_graph(run)

    def redraw(state, levers):
        model = nnx.merge(graph, state.parameters, state.constants)
        draws = jax.random.fold_in(jax.random.key(levers.seed), DRAWS)
        model.redraw(draws, step=state.step, every=run.redraw_every)
        return nnx.state(model, Constant)

    return redraw


def _make_renew(run: Run) -> Callable[[nnx.State, nnx.State], nnx.State]:
    """The function that brings estimates kept among the constants up to date with the parameters."""
    if not run.model.spectral:
        return lambda parameters, constants: constants
    graph = model_graph(run)

    def renew(parameters, constants):
        model = nnx.merge(graph, parameters, constants)
        model.power_iteration()
        return nnx.state(model, Constant)

    return renew


def make_evaluate(run: Run) -> Callable[[TrainState, Batch, Levers], Metrics]:
    """The function that gives a batch's mean `loss` in nats per token, and the numbers of `attention.Diagnostics`.

    These are layers x heads, of the sequences that `attention_diagnostics` looks at, and so are the errors of
    `run.probes`. Where not every prediction counts, the share of those that do and are right is the `accuracy`.
    """
    graph, probes = model_graph(run), [attention.parse_method(expression) for expression in run.probes]

    def evaluate(state: TrainState, batch: Batch, levers: Levers) -> Metrics:
        model = nnx.merge(graph, state.parameters, state.constants)
        numbers = evaluation_numbers(run, levers)
        logits, seen = model.observed(batch["tokens"][:, :-1], adaptive=run.adaptive, **numbers)
        layers = [(pair, block.attention) for block, pair in zip(model.blocks, seen, strict=True)]
        targets, counts = batch["tokens"][:, 1:], batch.get("counts")
        shares = {} if counts is None else {"accuracy": accuracy(logits, targets, counts)}
        loss = cross_entropy(logits, targets, counts)
        errors = attention_errors(layers, probes, **numbers) if probes else {}
        return {"loss": loss, **shares, **attention_diagnostics(layers, **numbers), **errors}

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

    def loss(parameters, constants, batch: Batch, levers: Levers) -> Float[Array, ""]:
        model = nnx.merge(graph, parameters, constants)
        logits = model(batch["tokens"][:, :-1], **training_numbers(run, levers))
        return cross_entropy(logits, batch["tokens"][:, 1:], batch.get("counts"))

    return loss


def _mean_over(f, micro_batches):
    """The mean of f over micro-batches, one at a time, so that memory is that of one."""
    count = micro_batches["tokens"].shape[0]
    first = jax.tree.map(lambda x: x[0], micro_batches)
    if count == 1:
        return f(first)

    def add(total, batch):
        return jax.tree.map(jnp.add, total, f(batch)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, first))
    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return jax.tree.map(lambda x: x / count, total)


def _model(run: Run, key) -> LanguageModel:
    return LanguageModel(run.model, layer_methods(run), vocabulary(run), nnx.Rngs(params=key))


def _abstract_model(run: Run) -> LanguageModel:
    check_run(run)
    return nnx.eval_shape(lambda: _model(run, jax.random.key(0)))
