"""Which attention method tolerates which temperature, on real text.

    python -m experiments.sweep quickstart

Trains a byte-level language model of 0.14 million parameters on the Python standard library's sources for 120
steps, at every scale and temperature, with every method: 36 points in 4 compiled programs. It takes about 3
minutes on 2 CPU cores, compilation included.

What it should show (one seed; at beta = 4, where logits exceed 100, training amplifies rounding, and Exact and Chunked
end 0.05 apart, so that a smaller gap between two methods says nothing there):

- At equal beta = scale / temperature the curves of a method are the same, bit for bit. Loss is lowest at beta =
  1/4, which is 1 / sqrt(head size), and rises by 0.2 nats a byte towards 1/64 and 4.
- Chunked computes what Exact does, up to rounding.
- Performer, with 32 random features, is 0.04 nats above Exact at beta = 1/64 and 0.08 to 0.12 above it elsewhere.
- TopK, with 16 of up to 128 keys, is within 0.02 nats of Exact from beta = 1/16 to 1, and 0.1 below it at 1/64.
"""

import attention
from experiments.axes import product
from experiments.config import Data, Model, Optimizer, Run
from experiments.presets import Sweep

sweep = Sweep(
    base=Run(
        steps=120,
        evaluate_every=30,
        evaluate_batches=8,
        model=Model(layers=2, width=64, heads=4, kv_heads=4, mlp_width=192, context=128),
        data=Data(batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=20),
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
