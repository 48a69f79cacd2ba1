"""What a run is made of. Every field is an option of the command line, and its comment is the help."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, Union

import attention
from attention.method import METHODS

# Every registered method, a stranger's too, is a choice on the command line.
AnyMethod = Union[tuple(METHODS.values())]  # noqa: UP007 (built at run time)


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
    positions: Literal["rotary", "learned", "sinusoidal"] = "rotary"
    """How a token knows where it is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations; parameters and the loss stay in float32."""
    layer_methods: tuple[str, ...] = ()
    """One method a layer, such as `Exact 'TopK(k=16)'`; empty for the run's `attention` in all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where the text comes from."""

    source: str = "stdlib"
    """`stdlib`, the Python standard library's own source files; or the path of a text file or a folder of them."""
    batch: int = 8
    """Sequences in a batch."""
    validation_share: float = 0.05
    """Share of the text held out for evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 3e-3
    """Peak learning rate; traced, so that a sweep over it compiles once."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
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
    """Micro-batches whose gradients are averaged into one step."""


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
    """Multiplies the scores; 1 / sqrt(head size) if not given. Traced."""
    temperature: float = 1.0
    """Divides the scores. Traced."""
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


def to_dict(config: Any) -> Any:
    """A configuration as plain JSON values; a method becomes the expression that makes it."""
    if isinstance(config, attention.Method):
        return repr(config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return str(config) if isinstance(config, Path) else config
