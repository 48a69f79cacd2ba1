"""What both layers of a small trained model attend with: a family of problems beside those that are drawn.

`trained.safetensors` has 256 tokens of Python in 4 heads of size 8, 2 of keys. It was made by

    python -m experiments.train --name small --steps 300 --evaluate-every 300 --evaluate-batches 1 \
        --checkpoint-every 300 --model.layers 2 --model.width 32 --model.heads 4 --model.kv-heads 2 \
        --model.mlp-width 64 --model.context 256 --data.batch 4 --optimizer.learning-rate 1e-2 attention:chunked
    python -m experiments.capture runs/small --out tests/trained.safetensors
"""

from pathlib import Path

import numpy as np

from attention.testing.cases import Case
from experiments.operand_files import load

LAYERS = load(Path(__file__).parent / "trained.safetensors")


def with_trained(case: Case, seed: int) -> Case:
    """The problems, the last two of them replaced by stretches of what the two layers attend with."""
    T, rng = case.query.shape[1], np.random.default_rng(seed)
    for b, layer in enumerate(LAYERS, start=len(case.query) - len(LAYERS)):
        first = rng.integers(layer.query.shape[1] - T + 1)
        for x, own in zip(case, (layer.query, layer.key, layer.value), strict=True):
            x[b] = own[0, first : first + T]
    return case
