"""What a run is made of. Every field is an option of the command line, and its comment is the help."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

import attention
from attention.method import METHODS
from attention.scale_rules import initial_scale
from experiments.tasks import TASKS, Task

# Every registered method, a stranger's too, is a choice on the command line, by its registered name.
AnyMethod = Union[  # noqa: UP007 (built at run time)
    tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in METHODS.items())  # ty: ignore[invalid-type-form]
]
AnyScaleRule = Literal[tuple(attention.SCALE_RULES)]  # ty: ignore[invalid-type-form]
TEXT = "text"
AnyTask = Literal[(TEXT, *TASKS)]  # ty: ignore[invalid-type-form]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only transformer."""

    layers: int = 2
    """Number of blocks."""
    width: int = 64
    """Size of the residual stream, D."""
    heads: int = 4
    """Query heads, N."""
    kv_heads: int = 4
    """Key and value heads, K; divides `heads`."""
    mlp_width: int = 192
    """Hidden size of the gated MLP."""
    context: int = 128
    """Tokens in a training sequence, T."""
    positions: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"
    """How a token knows where it is; with `none` by how many tokens it sees, and so from the second layer on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations; parameters and the loss stay in float32."""
    scale_rule: AnyScaleRule = "1/sqrt(H)"
    """What the scale is where the run gives none; `learned`, `qk-norm` and `ssmax` train one scale a head."""
    spectral: bool = False
    """Whether attention's projections are sigma-reparametrised."""
    gated: bool = False
    """Whether the outputs of heads are gated by the tokens that ask."""
    layer_methods: tuple[str, ...] = ()
    """One method a layer, such as `Exact 'TopK(k=16)'`; empty for the run's `attention` in all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What the model is trained on."""

    task: AnyTask = TEXT
    """`text`, or a task whose sequences are drawn on the fly."""
    source: str = "stdlib"
    """`stdlib`, the Python standard library's own source files; or the path of a text file or a folder of them."""
    batch: int = 8
    """Sequences in a batch."""
    validation_share: float = 0.05
    """Share of the text held out for evaluation."""
    symbols: int = 64
    """Different symbols in the sequences of `mqar`, `copy` and `induction`."""
    pairs: int = 8
    """Key-value pairs in a sequence of `mqar`."""
    depth: int = 3
    """Operators inside each other in an expression of `listops`, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 3e-3
    """Peak learning rate; traced, so that a sweep over it compiles once."""
    warmup_steps: int = 20
    """Steps of linear warm-up; fewer than `steps`."""
    final_share: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    accumulate: int = 1
    """Micro-batches into which a batch is split, to save memory; their gradients are averaged. Divides `batch`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    name: str = "run"
    """Name of the run's folder inside `folder`: letters, digits, `.`, `_` and `-`."""
    folder: Path = Path("runs")
    """Where runs are kept."""
    attention: AnyMethod = dataclasses.field(default_factory=attention.Exact)  # ty: ignore[invalid-type-form]
    """The attention method of every layer."""
    scale: float | None = None
    """Multiplies the scores, or where a learned scale starts; that of `model.scale_rule` if not given. Traced."""
    temperature: float = 1.0
    """Divides the scores. Traced."""
    evaluate_temperature: float | None = None
    """Divides the scores in evaluations; `temperature` if not given. Traced."""
    soft_cap: float | None = None
    """Scaled scores l become cap * tanh(l / cap). Traced."""
    stretch: float = 1.0
    """How many times longer sequences are than those that the scale suits; YaRN sharpens by it. Traced."""
    adaptive: bool = False
    """Whether evaluations sharpen rows of high entropy (adaptive temperature); generation never does."""
    probes: tuple[str, ...] = ()
    """Methods whose error, and certificate, on the model's own queries, keys and values every evaluation measures,
    such as `'TopK(k=16)' Performer`."""
    redraw_every: int = 0
    """Steps between draws of the constants of random methods; 0 for those that the run began with."""
    seed: int = 0
    """Draws the parameters, the batches, and the constants of random methods. Traced."""
    steps: int = 200
    """Optimizer steps."""
    evaluate_every: int = 50
    """Steps between evaluations."""
    evaluate_batches: int = 8
    """Held-out batches in an evaluation."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()


def layer_methods(run: Run) -> tuple[attention.Method, ...]:
    """The attention method of each layer.

    Raises:
        ValueError: `layer_methods` is not one a layer, or names an unknown method or field.
    """
    expressions = run.model.layer_methods
    if not expressions:
        return (run.attention,) * run.model.layers
    if len(expressions) != run.model.layers:
        raise ValueError(f"model.layer_methods is {expressions}: expected one for each of {run.model.layers} layers")
    return tuple(attention.parse_method(expression) for expression in expressions)


def redraws(method: attention.Method) -> bool:
    """Whether a method has constants that training can redraw."""
    return type(method).redrawn is not attention.Method.redrawn


def task_of(run: Run) -> Task | None:
    """The task of a run; None for text.

    Raises:
        ValueError: there are no such sequences.
    """
    data = run.data
    if data.task == TEXT:
        return None
    return TASKS[data.task](context=run.model.context, symbols=data.symbols, pairs=data.pairs, depth=data.depth)


def vocabulary(run: Run) -> int:
    """How many different tokens a run's model knows: 256 bytes, or those of its task."""
    task = task_of(run)
    return 256 if task is None else task.vocabulary


def starting_scale(run: Run) -> float:
    """The scale of a run, or where its learned scales start."""
    if run.scale is not None:
        return run.scale
    return initial_scale(run.model.scale_rule, run.model.width // run.model.heads, run.model.context)


def to_dict(config: Any) -> Any:
    """A configuration as plain JSON values; a method becomes the expression that makes it."""
    if isinstance(config, attention.Method):
        return repr(config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return str(config) if isinstance(config, Path) else config
