"""Which attention method tolerates which temperature, on real text.

    python -m experiments.sweep quickstart

Trains a byte-level language model of 0.14 million parameters on the Python standard library's sources for 150
steps, at every scale and temperature, with every method: 36 points in 4 compiled programs. It takes 3 to 4
minutes on 2 CPU cores, compilation included.

What it should show: at equal beta = scale / temperature the curves of a method are the same, bit for bit.
Chunked has the losses of Exact, up to rounding. TopK, which drops all but the 16 largest weights of a row, comes
closest to Exact where beta is large and attention peaked; Performer, whose random features need a number that
grows with e^beta, where beta is small and attention spread out.
"""

import attention
from experiments.axes import product
from experiments.config import Data, Model, Optimizer, Run
from experiments.presets import Sweep

sweep = Sweep(
    base=Run(
        steps=150,
        evaluate_every=30,
        evaluate_batches=8,
        model=Model(layers=2, width=64, heads=4, kv_heads=4, mlp_width=192, context=128),
        data=Data(batch=8),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=20),
    ),
    # Powers of two, so that equal ratios are equal bits.
    axes=product(
        attention=[
            attention.Exact(),
            attention.Chunked(query_chunk=64, key_chunk=64),
            attention.Performer(features=32),
            attention.TopK(k=16),
        ],
        scale=[1 / 16, 1 / 4, 1.0],
        temperature=[1 / 4, 1.0, 4.0],
    ),
)
