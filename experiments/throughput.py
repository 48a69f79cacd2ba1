"""Tokens per second of the trainer, against the same model and step in PyTorch where it is installed."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

import attention
from experiments import config
from experiments.contestants import Cell, loss_of
from experiments.drawing import COLOURS
from experiments.levers import levers
from experiments.metrics import named_leaves
from experiments.programs import Program, compiled, trace
from experiments.runtime import compiler_options
from experiments.timing import interleaved, spread

LEFT_OUT = "without attention"
MODEL = config.Model(layers=4, width=128, heads=4, kv_heads=4, mlp_width=384, context=256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """Tokens per second of a training step: this trainer with each method, and PyTorch with its fused attention."""

    methods: tuple[str, ...] = ("Chunked", "Exact", "Fused(implementation='xla')")
    """Methods of attention; what a method takes of a step is measured twice, alone and by leaving it out."""
    model: config.Model = MODEL
    """The model of all contestants."""
    batch: int = 16
    """Sequences in a batch."""
    rounds: int = 15
    """Turns of each contestant."""
    seconds: float = 120.0
    """After which no more turns begin; there are at least 3."""
    out: Path = Path("runs/benchmark/throughput")
    """Folder for results.json, throughput.svg and throughput.png."""

    def measured(self) -> list[dict[str, Any]]:
        """One row a contestant: rates, two losses, compilation, memory, and what attention takes of a step."""
        tokens = np.random.default_rng(0).integers(0, 256, (self.batch, self.model.context + 1), np.uint8)
        methods = [attention.parse_method(method) for method in self.methods]
        ours = {repr(method): Ours(self._run(method), tokens) for method in methods}
        left_out = Ours(self._run(LeftOut()), tokens)
        theirs = pytorch(self._run(methods[0]), left_out.parameters, tokens)
        everyone = ours | theirs
        losses = {name: [one.call(), one.call()] for name, one in everyone.items()}
        alone = {f"attention of {name}": one.attention for name, one in everyone.items()}
        calls = {name: one.call for name, one in everyone.items()} | alone | {LEFT_OUT: left_out.call}
        seconds = interleaved(calls, self.rounds, self.seconds)
        peer = next(iter(theirs), None)
        return [
            {
                "contestant": name,
                "seconds": spread(seconds[name]),
                "tokens_per_second": spread(self.batch * self.model.context / np.asarray(seconds[name])),
                "speed_of_pytorch": spread(np.asarray(seconds[peer]) / np.asarray(seconds[name])) if peer else None,
                "losses": losses[name],
                "attention_share_of_operations": attention_share(self.model),
                "attention_share_of_time": share_alone(seconds, name, self.model.layers),
                "share_without": share_without(seconds, name) if name in ours else None,
                **one.about,
            }
            for name, one in everyone.items()
        ]

    def _run(self, method: attention.Method) -> config.Run:
        return config.Run(attention=method, model=self.model, data=config.Data(batch=self.batch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut(attention.Method, register=False):
    """No attention: each token's own value times its own score, so that a step has everything else to do."""

    capabilities = attention.Capabilities(causal=True)

    def attend(self, inputs):
        own = (inputs.query * inputs.key[:, :, None]).sum(-1, keepdims=True)
        return own * inputs.value[:, :, None]

    def cost(self, T, S, *, num_heads, head_dim, is_causal=False):
        return attention.Cost(3.0 * T * num_heads * head_dim, 4.0 * 4 * T * num_heads * head_dim)


class Ours:
    """A training step of this trainer, and the gradient of its attention alone."""

    def __init__(self, run: config.Run, tokens: np.ndarray):
        self._batch, self._levers = {"tokens": tokens}, levers(run)
        program: Program = compiled(trace(run, self._batch, None))
        self._step, self._state = program.step, program.init(self._levers)
        self.parameters = {name: np.array(leaf) for name, leaf in named_leaves(self._state.parameters).items()}
        self.about = program.memory | program.timings
        self.attention = attention_alone(run, len(tokens))

    def call(self) -> float:
        self._state, metrics = self._step(self._state, self._batch, self._levers)
        return float(metrics["loss"])


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A step of a peer, and the gradient of its attention alone."""

    call: Callable[[], float]
    attention: Callable[[], Any]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def attention_alone(run: config.Run, batch: int) -> Callable[[], Any]:
    """The gradient of one layer's attention at the shapes of the run."""
    cell = _cell(run.model)
    *operands, cotangent = (jnp.repeat(jnp.asarray(x), batch, axis=0) for x in cell.operands())
    attend = functools.partial(attention.dot_product_attention, method=run.attention, is_causal=True)
    function = jax.jit(loss_of(cell, attend, cotangent), compiler_options=compiler_options())
    return lambda: jax.block_until_ready(function(*operands))


def _cell(model: config.Model) -> Cell:
    return Cell(model.context, True, True, model.heads, model.width // model.heads)


def attention_share(model: config.Model) -> float:
    """The share of the products with queries, keys and values in the operations that the definition of a step needs."""
    pairs = model.context * (model.context + 1) / 2
    scores = model.layers * 2 * pairs * model.width
    head = model.width // model.heads
    weights = model.width * (2 * model.width + 2 * model.kv_heads * head + 3 * model.mlp_width)
    others = model.context * (model.layers * weights + model.width * 256)
    return 3.5 * scores / (3.5 * scores + 3 * others)


def pytorch(run: config.Run, parameters: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, Theirs]:
    """PyTorch's step from the same parameters, as it is and through torch.compile; nothing where it is missing."""
    try:
        from experiments import pytorch_model
    except ImportError:
        return {}
    found = {}
    for name, compiles in (("PyTorch", False), ("PyTorch, compiled", True)):
        start = time.perf_counter()
        step = pytorch_model.make_step(run, parameters, compiled=compiles)
        found[name] = Theirs(
            functools.partial(step, tokens),
            pytorch_model.attention_alone(*_cell(run.model).operands(), len(tokens)),
            about={"compile_seconds": time.perf_counter() - start},
        )
    return found


def share_alone(seconds: dict[str, list[float]], name: str, layers: int) -> dict[str, float]:
    """The time of every layer's attention alone, as a share of a step's."""
    return spread(layers * np.asarray(seconds[f"attention of {name}"]) / np.asarray(seconds[name]))


def share_without(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    """The share of a step's time that it saves to leave attention out."""
    return spread(1 - np.asarray(seconds[LEFT_OUT]) / np.asarray(seconds[name]))


def figure(results: list[dict[str, Any]]) -> Figure:
    """A bar a contestant, from slow to fast; whiskers span the quartiles."""
    rows = sorted(results, key=lambda row: row["tokens_per_second"]["median"])
    drawing = Figure(figsize=(7.0, 0.45 * len(rows) + 1.1), layout="constrained")
    panel = drawing.subplots()
    rates = [row["tokens_per_second"] for row in rows]
    middle = [rate["median"] for rate in rates]
    spans = [
        [rate["median"] - rate["lower_quartile"] for rate in rates],
        [rate["upper_quartile"] - rate["median"] for rate in rates],
    ]
    colours = [COLOURS[4] if row["contestant"].startswith("PyTorch") else COLOURS[0] for row in rows]
    panel.barh([row["contestant"] for row in rows], middle, xerr=spans, color=colours, capsize=3)
    panel.xaxis.set_major_formatter(lambda rate, _: f"{rate / 1e3:g}")
    panel.set_xlabel("training speed (thousand tokens per second)")
    panel.spines[["top", "right"]].set_visible(False)
    return drawing


def table(results: list[dict[str, Any]]) -> Table:
    """The same numbers for a terminal."""
    share = results[0]["attention_share_of_operations"]
    shown = Table("contestant", "tokens / s", "speed of PyTorch", "share alone", "share left out", "second loss")
    shown.caption = (
        f"attention's share of the operations: {share:.2f}; of the time, as measured alone and by leaving it out"
    )
    for row in results:
        parts = (row[name] for name in ("speed_of_pytorch", "attention_share_of_time", "share_without"))
        told = ("-" if part is None else f"{part['median']:.2f}" for part in parts)
        shown.add_row(row["contestant"], f"{row['tokens_per_second']['median']:.0f}", *told, f"{row['losses'][1]:.6f}")
    return shown
