"""One compilation for all points that differ in traced axes alone, ahead of time and measured apart."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.config import Run
from experiments.levers import Levers, levers
from experiments.runtime import compiler_options
from experiments.steps import TrainState, make_evaluate, make_init, make_step, nonfinite_names

_CACHE_HITS = [0]
jax.monitoring.register_event_listener(
    lambda event, **_: _CACHE_HITS.__setitem__(0, _CACHE_HITS[0] + event.endswith("/cache_hits"))
)


class Traced(NamedTuple):
    """The three functions of a training run, traced, and so known to be possible, but not yet compiled."""

    run: Run
    lanes: int | None
    init: Any
    step: Any
    evaluate: Any
    parameters: int
    suspects: list[str]
    seconds: float


class Program(NamedTuple):
    """The three functions of a training run, compiled for one run, or for `lanes` of them at once."""

    run: Run
    lanes: int | None
    init: Callable[[Levers], TrainState]
    step: Callable[[TrainState, Any, Levers], tuple[TrainState, Any]]
    evaluate: Callable[[TrainState, Any, Levers], Any]
    parameters: int
    suspects: list[str]
    timings: dict[str, Any]
    memory: dict[str, int]
    cost: dict[str, float]

    def joined(self, trees: Sequence[Any]) -> Any:
        """One tree for each lane as the argument that the functions take."""
        return joined(trees, self.lanes)

    def by_lane(self, x: Any) -> np.ndarray:
        """What the functions return, with the axis of lanes first, of size 1 where there is one run."""
        return np.asarray(x)[None] if self.lanes is None else np.asarray(x)


def trace(run: Run, batch: dict[str, np.ndarray], lanes: int | None) -> Traced:
    """Traces the functions of a run.

    Args:
        run: the run; its traced fields do not matter.
        batch: one batch, for its shape.
        lanes: how many runs to vmap over; None for one run without vmap.

    Raises:
        UnsupportedError: the method cannot train a causal language model.
        ValueError: the method refuses its own configuration.
    """
    start = time.perf_counter()
    init, step, evaluate = make_init(run), make_step(run), make_evaluate(run)
    knobs, held_out = jax.eval_shape(lambda: levers(run)), _shapes(batch)
    training = held_out
    if lanes is not None:
        init, step, evaluate = jax.vmap(init), jax.vmap(step), jax.vmap(evaluate, in_axes=(0, None, 0))
        knobs, training = _stacked(knobs, lanes), _stacked(held_out, lanes)
    traced_init = jax.jit(init).trace(knobs)
    state = _shapes(traced_init.out_info)
    return Traced(
        run=run,
        lanes=lanes,
        init=traced_init,
        step=jax.jit(step, donate_argnums=0, compiler_options=compiler_options()).trace(state, training, knobs),
        evaluate=jax.jit(evaluate, compiler_options=compiler_options()).trace(state, held_out, knobs),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.parameters)) // (lanes or 1),
        suspects=nonfinite_names(run),
        seconds=time.perf_counter() - start,
    )


def joined(trees: Sequence[Any], lanes: int | None) -> Any:
    """One tree for each lane as the argument of functions under vmap; the only one where there is no vmap."""
    return trees[0] if lanes is None else jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def compiled(traced: Traced) -> Program:
    """Compiles, and notes what the training step took: seconds, memory and operations.

    `setup_seconds` is for all three functions: that of the initial state is often the same for two methods, and
    then the compilation cache has it. `cached` says whether the cache had the step.
    """
    start, hits = time.perf_counter(), _CACHE_HITS[0]
    step = traced.step.lower().compile()
    step_seconds, hits = time.perf_counter() - start, _CACHE_HITS[0] - hits
    init, evaluate = traced.init.lower().compile(), traced.evaluate.lower().compile()
    setup_seconds = traced.seconds + time.perf_counter() - start
    return Program(
        run=traced.run,
        lanes=traced.lanes,
        init=init,
        step=step,
        evaluate=evaluate,
        parameters=traced.parameters,
        suspects=traced.suspects,
        timings={"setup_seconds": setup_seconds, "compile_seconds": step_seconds, "cached": hits > 0},
        memory=_memory(step),
        cost=_cost(step),
    )


def _memory(step: Any) -> dict[str, int]:
    analysis = step.memory_analysis()  # None on a backend that does not tell
    names = {"temporary_bytes": "temp", "argument_bytes": "argument", "output_bytes": "output"}
    return {name: int(getattr(analysis, f"{kind}_size_in_bytes", 0)) for name, kind in names.items()}


def _cost(step: Any) -> dict[str, float]:
    analysis = step.cost_analysis() or {}
    names = {"flops": "flops", "bytes_accessed": "bytes accessed"}
    return {name: float(analysis.get(key, 0.0)) for name, key in names.items()}


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _stacked(tree: Any, lanes: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype), tree)
