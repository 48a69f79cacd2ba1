"""What a result depends on beside its configuration: the text, and the methods that its backend resolves to."""

import functools
import hashlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention import Method
from attention.inputs import prepare
from experiments.config import Run, layer_methods, task_of
from experiments.data import corpus, splits, training_batches, validation_batches


def describe_corpus(run: Run) -> dict[str, Any]:
    """The text of a run: its hash, its size, and the loss of a model that knows only how often bytes occur.

    Of a task: its name, and a hash of its first batches, which tells whether it is still drawn as it was.
    """
    if task_of(run) is not None:
        digest = hashlib.sha256()
        for batch in (validation_batches(run)[0], next(training_batches(replace(run, seed=0)))):
            digest.update(batch["tokens"].tobytes())
        return {"source": run.data.task, "hash": digest.hexdigest()}
    text = corpus(run.data.source)
    sides = splits(run)
    return {
        "source": run.data.source,
        "hash": text.hash,
        "files": text.files,
        "bytes": len(text.tokens),
        "validation_bytes": len(sides.validation),
        "unigram_entropy": _unigram(run.data.source, run.data.validation_share),
    }


def describe_methods(run: Run) -> list[str]:
    """The method that computes each layer on this backend, as the expression that makes it."""
    return [repr(resolved(method, run)) for method in layer_methods(run)]


def resolved(method: Method, run: Run) -> Method:
    """What a layer's method resolves to in the shapes and the dtype of a run; nothing is computed."""
    model, found = run.model, []
    size, dtype = model.width // model.heads, jnp.dtype(model.dtype)

    options: dict[str, Any] = {"is_causal": True, "logits_soft_cap": run.soft_cap}

    def look(query, key, rng):
        found.append(method.resolved(prepare(method, query, key, key, rng=rng, **options)))

    shapes = ((run.data.batch, model.context, heads, size) for heads in (model.heads, model.kv_heads))
    jax.eval_shape(look, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.random.key(0))
    return found[0]


@functools.cache
def _unigram(source: str, share: float) -> float:
    """Cross-entropy of the held-out bytes under the frequencies of the training bytes, in nats."""
    tokens = corpus(source).tokens
    cut = len(tokens) - int(len(tokens) * share)
    # One of each byte added, so that a byte that training lacks has no infinite cost.
    counts = np.bincount(tokens[:cut], minlength=256) + 1.0
    held_out = np.bincount(tokens[cut:], minlength=256)
    return float(-(held_out * np.log(counts / counts.sum())).sum() / held_out.sum())
