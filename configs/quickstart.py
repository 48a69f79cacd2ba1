"""Which attention method tolerates which temperature, on real text.

    python -m experiments.sweep quickstart

Trains a small byte-level language model on the Python standard library's sources at every scale and
temperature with every method.
"""

import attention
from experiments.axes import product
from experiments.config import Data, Model, Optimizer, Run
from experiments.presets import Sweep

sweep = Sweep(
    base=Run(
        steps=200,
        evaluate_every=40,
        evaluate_batches=8,
        model=Model(layers=2, width=64, heads=4, kv_heads=4, mlp_width=192, context=128),
        data=Data(batch=8),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=20),
    ),
    axes=product(
        attention=[attention.Exact(), attention.Performer(features=32)],
        scale=[0.0625, 0.25, 1.0],
        temperature=[0.25, 1.0, 4.0],
    ),
)
