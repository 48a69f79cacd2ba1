"""Queries, keys and values in files: what a model attended with, for whoever measures methods on it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from experiments.files import write_bytes
from experiments.operands import Operands

FORMAT = 1
"""The version of the files that this code reads and writes."""
ABOUT = "attention-lab"
"""The entry of their metadata."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer attended with: weights softmax(beta query . key), `beta` `N`, the others as in `Operands`."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    beta: np.ndarray


def save(path: Path, layers: list[Layer], about: str) -> None:
    """Writes layers as safetensors, `<layer>/query` and so on, in float32; `about` says whose they are."""
    arrays = {
        f"{depth}/{name}": np.ascontiguousarray(array, np.float32)
        for depth, layer in enumerate(layers)
        for name, array in vars(layer).items()
    }
    # One entry: those of a file are in no order.
    metadata = {ABOUT: json.dumps({"format": FORMAT, "layers": len(layers), "about": about})}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, safetensors.numpy.save(arrays, metadata))


def load(path: Path) -> list[Operands]:
    """The operands of each layer in a file.

    Queries are multiplied by beta sqrt(H): scaled by 1 / sqrt(H), as attention is by itself, they have the logits that
    the model had.

    Raises:
        ValueError: there is no such file, or it is none of `save`'s.
    """
    if not path.is_file():
        raise ValueError(f"operands is {path}: no such file; expected one that `python -m experiments.capture` wrote")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata, arrays = json.loads((file.metadata() or {}).get(ABOUT, "{}")), file.get_tensors()
    except safetensors.SafetensorError as error:
        raise ValueError(f"operands is {path}: no safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"operands is {path}, of format {metadata.get('format')}: expected {FORMAT}")
    names = [field.name for field in dataclasses.fields(Layer)]
    layers = [Layer(**{name: arrays[f"{depth}/{name}"] for name in names}) for depth in range(metadata["layers"])]
    return [operands_of(layer, metadata["about"]) for layer in layers]


def operands_of(layer: Layer, about: str) -> Operands:
    """What a layer attended with as operands of causal attention scaled by 1 / sqrt(H): beta is in the queries."""
    factors = layer.beta * np.sqrt(np.float32(layer.query.shape[-1]))
    return Operands(about, layer.query * factors[:, None], layer.key, layer.value, causal=True)


def concatenated(operands: list[Operands]) -> Operands:
    """Operands of equal shapes as one, along the batch axis."""
    query, key, value = (np.concatenate([getattr(x, name) for x in operands]) for name in ("query", "key", "value"))
    return operands[0]._replace(query=query, key=key, value=value)
