"""Does beta that grows with the length stop attention from dispersing?

    python -m experiments.study length_beta

Axes, without training: n - 1 logits of -2 and one of 3, n = 10 to 100,000; softmax, and SSMax, which multiplies the
logits by 0.43 ln n. With training: a model of 2 layers learns induction (what followed the marker?) in sequences of 32
tokens, three seeds each with the scale 1/sqrt(H) and with SSMax, and each with rotary positions and without any, and
answers in sequences of 16 to 16,384. The plain one does so as it was trained, at a half and a quarter of its
temperature, and at an adaptive temperature. Rotary positions beyond those of training are new to a model; without
positions, where a token knows them by how many it sees, what changes with the length is the attention alone.

Metric: the largest weight; of the models the share of right answers, the loss of the answer, and the largest weight of
the query that answers, in the last layer and the head where it is largest. There are 64 sequences of each length up to
1,024 tokens, and 16 of 4,096 and of 16,384.

It takes about 18 minutes on 2 CPU cores.

Expected: the largest weight falls from 0.943 to 0.0015 under softmax and rises from 0.940 to 1.000 under SSMax
(Nakanishi, arXiv 2501.19399, figure 1, which has these logits and this 0.43); bounded logits must disperse, whatever
the temperature, and an adaptive temperature helps without a cure (Velickovic et al., arXiv 2410.01104, theorem 2.2 and
section 5); SSMax keeps more of its accuracy beyond the lengths of training (2501.19399, section 4.2).

Found (docs/results/length_beta, 3 seeds):

- Fixed logits: 0.943 to 0.0015 under softmax and 0.940 to 1.000 under SSMax, as published.
- Trained with rotary positions: the largest weight disperses as expected. At 1,024 tokens it is 0.04 under softmax,
  0.58 and 0.85 at a half and a quarter of the temperature, 0.62 at an adaptive one, and 0.78 under SSMax; at 16,384
  tokens 0.01, 0.04, 0.26, 0.01 and 0.48. A smaller temperature puts the fall off; beta that grows with the length slows
  it most.
- The answers do not follow. They are right 89 to 100% of the time in 16 tokens, 66 to 80% in 64 and 13 to 21% in 256.
  In 1,024 tokens they are right 7% of the time with softmax, 13 and 8% at the smaller temperatures and 9% with SSMax,
  and beyond no more often than by guessing (6%): the weight stays large, on a key that is not the right one.
- Without positions they follow a little, as published: right in 64, 256 and 1,024 tokens 92, 40 and 21% of the time
  with SSMax (20 to 23% over the seeds in 1,024), and 86, 34 and 14% with softmax (9 to 17%). So rotary positions beyond
  those of training are part of what fails, and not all of it: in 4,096 tokens nothing is above guessing by more than
  the seeds' spread, with SSMax at a largest weight of 0.83.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import attention
from experiments.axes import axis, product
from experiments.config import Data, Model, Optimizer, Run
from experiments.drawing import panels
from experiments.evaluate import held_out
from experiments.levers import evaluation_numbers, levers
from experiments.metrics import accuracy, cross_entropy
from experiments.points import static_part
from experiments.presets import Sweep
from experiments.runtime import compiler_options
from experiments.saved import Saved, load
from experiments.steps import model_graph
from experiments.studies import SMALL, Row, Study, Work
from experiments.study_figures import Summary, chosen, curves, keys_below, powers, values

SSMAX = 0.43
LOW, HIGH = -2.0, 3.0
LEAST = 16  # sequences, however long


def largest_weights(keys: int) -> dict[str, float]:
    """The largest weight of softmax and of SSMax over `keys` logits, one of them 3 and the others -2."""
    key = np.full((1, keys, 1, 1), LOW, np.float32)
    key[:, -1] = HIGH
    query, marked = np.ones((1, 1, 1, 1), np.float32), (key == HIGH).astype(np.float32)
    seen = attention.visible_keys(query, key)
    queries = {"softmax": query, "SSMax": query * SSMAX * jnp.log(seen)[..., None]}
    # A value of 1 at one key and 0 elsewhere makes the output that key's weight.
    return {
        name: float(attention.dot_product_attention(q, key, marked, scale=1.0)[0, 0, 0, 0])
        for name, q in queries.items()
    }


VARIANTS = {
    "softmax": ("1/sqrt(H)", 1.0, False),
    "softmax, temperature / 2": ("1/sqrt(H)", 0.5, False),
    "softmax, temperature / 4": ("1/sqrt(H)", 0.25, False),
    "softmax, adaptive temperature": ("1/sqrt(H)", 1.0, True),
    "SSMax": ("ssmax", 1.0, False),
}
"""What is evaluated: the rule that it was trained with, the factor of its temperature, and whether that adapts."""


def measure(work: Work, contexts: tuple[int, ...], counts: tuple[int, ...], tokens: int) -> list[Row]:
    rows = []
    for keys in counts:
        for name, weight in largest_weights(keys).items():
            rows.append({"axes": {"logits": name, "keys": keys}, "seed": 0, "numbers": {"largest weight": weight}})
    for axes, folder in work.trained():
        for name, (rule, factor, adaptive) in VARIANTS.items():
            if rule == axes["model.scale_rule"]:
                saved = load(folder, attention.Fused())
                run = dataclasses.replace(saved.run, evaluate_temperature=factor, adaptive=adaptive)
                for context in contexts:
                    numbers = answers(saved._replace(run=run), context, min(64, max(LEAST, tokens // context)))
                    where = {"attention": name, "positions": axes["model.positions"], "tokens": context}
                    rows.append({"axes": where, "seed": axes["seed"], "numbers": numbers})
    return rows


def answers(saved: Saved, context: int, sequences: int) -> dict[str, float]:
    """Accuracy, loss and largest weight of the answers in so many sequences of this length."""
    rows = max(1, saved.run.data.batch * saved.run.model.context // context)
    batches = held_out(saved, context, -(-sequences // rows))
    look, numbers = _look(static_part(saved.run)), levers(saved.run)
    found = jax.device_get([look(saved.parameters, saved.constants, batch, numbers) for batch in batches])
    return {name: float(np.mean([x[name] for x in found], dtype=np.float64)) for name in found[0]}


@functools.lru_cache(maxsize=8)
def _look(static: Run):
    graph = model_graph(static)

    def look(parameters, constants, batch, levers):
        model = nnx.merge(graph, parameters, constants)
        numbers = evaluation_numbers(static, levers)
        logits, seen = model.observed(batch["tokens"][:, :-1], adaptive=static.adaptive, **numbers)
        targets, counts = batch["tokens"][:, 1:], batch["counts"]
        own = model.blocks[-1].attention.scale
        scale = own[...] if numbers["scale"] is None else numbers["scale"]
        query, key, value = seen[-1]
        # The answer is the last prediction, whose query sees every key.
        steps = attention.attention_steps(query[:, -1:], key, value, scale=scale, temperature=numbers["temperature"])
        return {
            "accuracy": accuracy(logits, targets, counts),
            "loss": cross_entropy(logits, targets, counts),
            "largest weight": steps.weights.max(-1).max(1).mean(),
        }

    return jax.jit(look, compiler_options=compiler_options())


TITLES = {
    "accuracy": "right answers",
    "loss": "loss of the answer (nats)",
    "largest weight": "largest weight, last layer",
}


def figure(summary: Summary) -> Figure:
    """Left: the largest weight over n logits of which one is 5 above all others. Then, for models trained in 32 \
tokens with rotary positions (above) and without any (below), accuracy, loss and largest weight of the answer in \
longer sequences; means over seeds, with bands over all."""
    logits = [row for row in summary if "logits" in row["axes"]]
    trained = [row for row in summary if "attention" in row["axes"]]
    kinds = values(trained, "positions")
    drawing, grid = panels(4 * len(kinds), width=3.6, height=3.4)
    first, *empty = grid[:: len(TITLES) + 1]
    curves(first, logits, "keys", "largest weight", "logits")
    powers(first, values(logits, "keys"), "keys")
    first.set_title("largest weight, fixed logits")
    first.legend(fontsize="small")
    for panel in empty:
        panel.set_visible(False)
    for place, kind in enumerate(kinds):
        rows = chosen(trained, positions=kind)
        for panel, (number, title) in zip(grid[place * 4 + 1 :], TITLES.items(), strict=False):
            curves(panel, rows, "tokens", number, "attention")
            powers(panel, values(rows, "tokens"), "tokens")
            panel.tick_params(axis="x", rotation=45)
            panel.set_title(f"{title}\n{'no' if kind == 'none' else kind} positions")
    keys_below(drawing, grid[1], columns=5)
    return drawing


def _study(base: Run, seeds: int, **sizes) -> Study:
    rules, positions = axis("model.scale_rule", ["1/sqrt(H)", "ssmax"]), axis("model.positions", ["rotary", "none"])
    axes = product(positions, rules, seed=range(seeds))
    measured = functools.partial(measure, **sizes)
    return Study(sweep=Sweep(base=base, axes=axes), measure=measured, figure=figure)


_BASE = Run(
    steps=2000,
    evaluate_every=500,
    evaluate_batches=4,
    model=Model(layers=2, width=32, heads=2, kv_heads=2, mlp_width=64, context=32),
    data=Data(task="induction", symbols=16, batch=64),
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=20),
)
study = _study(
    _BASE,
    seeds=3,
    contexts=(16, 64, 256, 1024, 4096, 16384),
    counts=(10, 100, 1000, 10_000, 100_000),
    tokens=2**16,
)
_TINY = dataclasses.replace(SMALL, data=Data(task="induction", symbols=4, batch=4))
smoke = _study(_TINY, seeds=2, contexts=(32,), counts=(10, 100), tokens=64)
