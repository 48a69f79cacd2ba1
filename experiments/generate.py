"""Continues a prompt with the model of a run: `python -m experiments.generate runs/run --prompt "def "`.

The prompt is text; for a run on a task, its tokens as integers. What follows is written to the terminal token by token,
each from the state that attention keeps of those before it. The same arguments give the same tokens.

Exit codes: 0 finished, 2 a wrong option or input.
"""

import codecs
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int

import attention
from experiments.checks import check_run
from experiments.cli import exit_code
from experiments.config import Run, task_of, vocabulary
from experiments.levers import evaluation_numbers, levers
from experiments.runtime import start_process
from experiments.saved import Saved, load
from experiments.steps import model_graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional]
    """The folder of a run, which holds its config.json and its checkpoints."""
    prompt: str
    """What to continue."""
    tokens: int = 200
    """How many tokens to add."""
    method: str | None = None
    """An attention method for every layer, such as 'TopK(k=16)'; those of the run if not given."""
    attention_temperature: float | None = None
    """Divides the scores of attention; that of the run's evaluations if not given."""
    temperature: float = 1.0
    """Divides the logits of the next token; 0 takes the largest."""
    top_p: float = 1.0
    """Draws among the most probable tokens that together have at least this probability."""
    seed: int = 0
    """Draws the tokens."""


def generated(
    saved: Saved, prompt: np.ndarray, count: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
) -> Iterator[int]:
    """Yields `count` tokens that follow the prompt.

    The prompt is read at once, and each token by itself: two programs, whatever the numbers.

    Args:
        saved: the model; its run's evaluation temperature and soft cap are those of attention.
        prompt: integers, at least one.
        count: how many.
        temperature, top_p, seed: as in `Options`.

    Raises:
        ValueError: a number is out of range, or learned positions end before the last token.
        UnsupportedError: a layer's method does not decode.
    """
    _check(prompt, vocabulary(saved.run), count, temperature, top_p)
    run, graph = saved.run, model_graph(saved.run)
    numbers = evaluation_numbers(run, levers(run))
    room = len(prompt) + count

    @jax.jit
    def begin(weights, tokens, numbers, how):
        model = nnx.merge(graph, *weights)
        state, logits = model.extend(model.init_state(1, room), tokens, **numbers)
        return state, chosen(logits[0, -1], jnp.int32(0), *how)

    @functools.partial(jax.jit, donate_argnums=1)
    def advance(weights, state, token, index, numbers, how):
        state, logits = nnx.merge(graph, *weights).extend(state, token[None, None], **numbers)
        return state, chosen(logits[0, -1], index, *how)

    weights = (saved.parameters, saved.constants)
    how = (jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p))
    state, token = begin(weights, jnp.asarray(prompt, jnp.int32)[None], numbers, how)
    yield int(token)
    for index in range(1, count):
        state, token = advance(weights, state, token, jnp.int32(index), numbers, how)
        yield int(token)


def chosen(
    logits: Float[Array, " V"],
    index: Int[Array, ""],
    key: Array,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, ""]:
    """The token at place `index`: the largest logit at temperature 0, else drawn from the nucleus.

    References:
        Holtzman et al., "The curious case of neural text degeneration", arXiv 1904.09751, section 3.1.
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    order = jnp.argsort(-scaled)
    probabilities = jax.nn.softmax(scaled)[order]
    before = jnp.cumsum(probabilities) - probabilities
    # The most probable token stays, however small top_p is.
    kept = (before < top_p) | (jnp.arange(len(order)) == 0)
    place = jax.random.categorical(jax.random.fold_in(key, index), jnp.where(kept, scaled[order], -jnp.inf))
    return jnp.where(temperature > 0, order[place], logits.argmax()).astype(jnp.int32)


def _check(prompt: np.ndarray, tokens: int, count: int, temperature: float, top_p: float) -> None:
    if not len(prompt):
        raise ValueError("prompt is empty: expected at least one token")
    if not all(0 <= token < tokens for token in prompt.tolist()):
        raise ValueError(f"prompt is {prompt.tolist()}: expected tokens from 0 to {tokens - 1}")
    if count < 1:
        raise ValueError(f"tokens is {count}: expected an integer of at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: expected a finite number of at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: expected a number above 0 and at most 1")


def encoded(run: Run, prompt: str) -> np.ndarray:
    """The prompt's bytes, or the integers that it lists for a run on a task."""
    if task_of(run) is None:
        return np.frombuffer(prompt.encode("utf-8", "surrogateescape"), np.uint8)
    try:
        return np.array([int(word) for word in prompt.split()], np.int64)
    except ValueError as error:
        raise ValueError(f"prompt is {prompt!r}: expected integers, since the run is on {run.data.task}") from error


def decoder(run: Run) -> Callable[[int], str]:
    """The function that gives the text of one token after another; a character is written once it is whole."""
    if task_of(run) is not None:
        return lambda token: f" {token}"
    text = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda token: text.decode(bytes([token]))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.generate", description=__doc__)
        saved = load(options.folder, None if options.method is None else attention.parse_method(options.method))
        if options.attention_temperature is not None:
            run = dataclasses.replace(saved.run, evaluate_temperature=options.attention_temperature)
            check_run(run)
            saved = saved._replace(run=run)
        if saved.drawn:
            print(f"not in the checkpoint, drawn from the run's seed: {', '.join(saved.drawn)}", file=sys.stderr)
        numbers = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
        tokens = generated(saved, encoded(saved.run, options.prompt), options.tokens, **numbers)
        written, first = decoder(saved.run), next(tokens)  # an error comes before any text
        print(options.prompt, written(first), sep="", end="", flush=True)
        for token in tokens:
            print(written(token), end="", flush=True)
        print()

    start_process()
    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
