"""What a result depends on beside its configuration: the text, and what the process runs on."""

import functools
from typing import Any

import numpy as np

from experiments.config import Run
from experiments.data import corpus, splits


def describe_corpus(run: Run) -> dict[str, Any]:
    """The text of a run: its hash, its size, and the loss of a model that knows only how often bytes occur."""
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


@functools.cache
def _unigram(source: str, share: float) -> float:
    """Cross-entropy of the held-out bytes under the frequencies of the training bytes, in nats."""
    tokens = corpus(source).tokens
    cut = len(tokens) - int(len(tokens) * share)
    # One of each byte added, so that a byte that training lacks has no infinite cost.
    counts = np.bincount(tokens[:cut], minlength=256) + 1.0
    held_out = np.bincount(tokens[cut:], minlength=256)
    return float(-(held_out * np.log(counts / counts.sum())).sum() / held_out.sum())
