# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Scale and temperature
#
# Softmax attention has two knobs that are really one:
#
# $$p_{ij} = \frac{e^{\beta\, q_i \cdot k_j}}{\sum_l e^{\beta\, q_i \cdot k_l}}, \qquad
#   \beta = \frac{\text{scale}}{\text{temperature}}.$$
#
# A large $\beta$ (low temperature) picks the best key, a small one averages over all keys. This notebook turns the
# knob, and its relatives, and measures what happens to
#
# - **entropy**: how spread the weights are, $-\sum_j p_j \log p_j$;
# - **sparsity**: how many keys count, $1 / \sum_j p_j^2$, and how much the 16 largest weights add up to;
# - **gradients**: what is left for learning;
# - **stability**: how much a small error in queries and keys moves the output;
#
# with theory drawn over the measurements, and in the end asks which approximate method is valid at which temperature.
# Axis letters: `B` batch, `T` queries, `S` keys, `N` heads, `H` head size, `E` value size. In formulas, $n$ is the
# number of keys.

# %%
import textwrap

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.scipy.stats import norm

import attention

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe and Ito: told apart by all readers
plt.rcParams |= {"figure.dpi": 72, "figure.constrained_layout.use": True, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def verdict(claim, holds, measured):
    text = f"{'HOLDS' if holds else 'DOES NOT HOLD'}: {claim}. {measured}"
    print(textwrap.fill(text, 110, subsequent_indent="    "))


def drawn(axes, x, measured, theory, label, colour="#0072B2", marker="o"):
    """Measurements `SEEDS X` as points with the range over seeds, theory `X` as a line."""
    middle, low, high = measured.mean(0), measured.min(0), measured.max(0)
    axes.errorbar(x, middle, [middle - low, high - middle], fmt=marker, color=colour, label=label, markersize=4)
    if theory is not None:
        axes.plot(x, theory, color=colour, linewidth=1.2)


# %% [markdown]
# ## One number
#
# The library takes `scale` and `temperature` as `dot_product_attention(..., scale=, temperature=)`; both may be
# traced, and may be one number a head. Softmax sees their quotient alone:

# %%
n, H, SEEDS = 256, 64, 4
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, n, SEEDS, H))
pairs = [(0.25, 1.0), (0.5, 2.0), (1.0, 4.0), (0.125, 0.5)]
outputs = [attention.dot_product_attention(q, k, v, scale=scale, temperature=T) for scale, T in pairs]
verdict(
    f"(scale, temperature) = {', '.join(map(str, pairs))} give the same output, bit for bit",
    all(bool((output == outputs[0]).all()) for output in outputs),
    f"{outputs[0].size} numbers compared for each pair.",
)

# %% [markdown]
# ## Temperature
#
# Independent normal queries and keys with scale $1 / \sqrt{H}$ have logits of standard deviation $s \approx 1 / T$.
# For $n$ independent normal logits (the *random energy model* of physics) much is known:
#
# - entropy $\approx \log n - s^2 / 2$ until it vanishes at $s = \sqrt{2 \log n}$, where one key takes over;
# - effective keys $1 / \sum p^2 \approx n\, e^{-s^2}$, by the moments of the log-normal distribution, while
#   $s < \sqrt{\log n / 2}$;
# - the mass of the $k$ largest weights $\approx \Phi\big(s - \Phi^{-1}(1 - k / n)\big)$, since weighting by $e^l$
#   moves the mean of a normal $l$ by $s^2$;
# - the trace of softmax's derivative by the logits is $1 - \sum p^2$, exactly;
# - the gradient of $r \cdot o$ by a query is $\beta \sum_j p_j (k_j - \bar k)(v_j \cdot r)$, with
#   $\bar k = \sum_j p_j k_j$. For normal values, independent of the weights, and $|r|^2 = E$ its mean square is
#   $\beta^2 E \sum_j p_j^2 |k_j - \bar k|^2$, and were the keys independent of the weights too,
#   $|k_j - \bar k|^2$ would be $H (1 - 2 p_j + \sum_l p_l^2)$ on average.
#
# When it is cold, few rows learn much and most learn nothing: a softmax between two keys of nearly equal logits has a
# derivative that grows with $\beta$, and any other none. The mean square is then that of a few rows, so that the
# median is shown too.
#
# A temperature for each head means that one call measures all temperatures: the heads below are copies of `SEEDS`
# heads, one at each temperature.

# %%
TEMPERATURES = 2.0 ** np.arange(-4, 4.5, 0.5)
per_head = np.tile(TEMPERATURES, SEEDS)  # head = seed x temperature
many_q, many_k, many_v = (jnp.repeat(x, len(TEMPERATURES), axis=2) for x in (q, k, v))
direction = jax.random.normal(jax.random.key(1), many_q.shape)


def by_seed(numbers):
    return np.asarray(numbers).reshape(SEEDS, len(TEMPERATURES))


@jax.jit
def temperature_numbers(q, k, v):
    """Of each row the sum of p^2 and the factor of the gradient's mean square, `N T`; gradients' norms, `T N`."""
    p = attention.attention_steps(q, k, v, temperature=per_head).weights[0]
    squares = (p**2).sum(-1, keepdims=True)

    def projection(q):
        return (attention.dot_product_attention(q, k, v, temperature=per_head) * direction).sum()

    gradient = jnp.linalg.norm(jax.grad(projection)(q)[0], axis=-1)
    return squares[..., 0], (p**2 * (1 - 2 * p + squares)).sum(-1), gradient


measured = attention.diagnostics(many_q, many_k, temperature=per_head, k=16)
squares, factor, gradients = temperature_numbers(many_q, many_k, many_v)
s = 1 / TEMPERATURES
beta = s / np.sqrt(H)
effective = np.where(s < np.sqrt(np.log(n) / 2), n * np.exp(-(s**2)), np.nan)
theory = {
    "entropy (nats)": np.maximum(np.log(n) - s**2 / 2, 0),
    "effective keys": effective,
    "mass of the 16 largest weights": norm.cdf(s - norm.ppf(1 - 16 / n)),
    "trace of softmax's derivative": 1 - 1 / effective,
    "gradient of a query": beta * H * np.sqrt(by_seed(factor.mean(-1)).mean(0)),
}
lines = {
    "entropy (nats)": measured.entropy,
    "effective keys": measured.effective_keys,
    "mass of the 16 largest weights": measured.top_mass,
    "trace of softmax's derivative": 1 - squares.mean(-1),
    "gradient of a query": jnp.sqrt((gradients**2).mean(0)),
}
figure, grid = plt.subplots(1, 5, figsize=(16, 3.2))
for axes, (name, numbers) in zip(grid, lines.items(), strict=True):
    label = "root of the mean square" if axes is grid[4] else "measured"
    drawn(axes, TEMPERATURES, by_seed(numbers), theory[name], label)
    axes.set_xscale("log", base=2)
    axes.set(title=name, xlabel="temperature")
grid[1].set_yscale("log")
grid[4].set_yscale("log")
grid[0].plot([], [], color=COLOURS[0], linewidth=1.2, label="theory")
drawn(grid[4], TEMPERATURES, by_seed(jnp.median(gradients, axis=0)), None, "median of the rows", COLOURS[1], "s")
grid[0].legend(fontsize=8)
grid[4].legend(fontsize=8)
plt.show()

typical = by_seed(jnp.median(gradients, axis=0)).mean(0)
mean_square = by_seed(jnp.sqrt((gradients**2).mean(0))).mean(0)
for name, numbers in (("median of the rows' gradients", typical), ("root of the mean square", mean_square)):
    best = numbers.argmax()
    verdict(
        f"the {name} is largest at a temperature in between, and falls towards both ends",
        0 < best < len(TEMPERATURES) - 1,
        f"Largest at T = {TEMPERATURES[best]:.3g}; at T = {TEMPERATURES[0]:.3g} {numbers[0] / numbers[best]:.3f} of "
        f"that, at T = {TEMPERATURES[-1]:.3g} {numbers[-1] / numbers[best]:.4f}.",
    )
warm = TEMPERATURES >= 1
gap = np.abs(by_seed(measured.entropy).mean(0) - theory["entropy (nats)"])
verdict(
    "the random energy model gives the entropy within 0.1 nats at T >= 1",
    gap[warm].max() < 0.1,
    f"Largest gap {gap[warm].max():.3f} there; {gap.max():.3f} at T = {TEMPERATURES[gap.argmax()]:.3g}, where few keys "
    "count and n = 256 is far from infinite.",
)
gap = np.abs(mean_square / theory["gradient of a query"] - 1)
verdict(
    "the formula for the gradient is within 20% at all temperatures",
    gap.max() < 0.2,
    f"Largest deviation {gap.max():.1%}, at T = {TEMPERATURES[gap.argmax()]:.3g}.",
)

# %% [markdown]
# ## Bounds that hold in every row
#
# Averages over normal logits are one thing; a bound for each row another. With logits $l$ between $m$ and $M$ and
# without temperature in them,
#
# $$\frac{1}{n} e^{-(M - m) / T} \le p_j \le \frac{1}{n} e^{(M - m) / T}$$
#
# (Veličković et al., arXiv 2410.01104): bounded logits disperse, no matter what was trained. And with
# $g = |u - \bar u| \sqrt{n / (n - 1)}$ for a row's logits $u$, temperature included, the entropy is at least
#
# $$\log\big(1 + (n - 1) e^{-g}\big) + \frac{g\,(n - 1) e^{-g}}{1 + (n - 1) e^{-g}},$$
#
# the bound behind normalising the weights of queries and keys (Zhai et al., arXiv 2303.06296).

# %%
steps = attention.attention_steps(many_q, many_k, many_v, temperature=per_head)


@jax.jit
def row_bounds(u):
    """Of each row of logits: entropy and its lower bound; least and largest weight; the bounds on these."""
    p = jax.nn.softmax(u)
    entropy = -jnp.where(p > 0, p * jnp.log(p), 0).sum(-1)
    g = jnp.linalg.norm(u - u.mean(-1, keepdims=True), axis=-1) * np.sqrt(n / (n - 1))
    rest = (n - 1) * jnp.exp(-g)
    spread = u.max(-1) - u.min(-1)
    lower = jnp.log1p(rest) + g * rest / (1 + rest)
    return entropy, lower, p.min(-1), p.max(-1), jnp.exp(-spread) / n, jnp.exp(spread) / n


entropy, lower, least, largest, least_bound, largest_bound = row_bounds(steps.masked_scores[0])
slack = n * float(jnp.finfo(jnp.float32).eps)  # of sums over n terms in float32
verdict(
    "the entropy of no row is below its bound",
    bool((entropy >= lower - slack * np.log(n)).all()),
    f"{entropy.size} rows; the bound is {float((lower / entropy)[-1].mean()):.0%} of the entropy at "
    f"T = {TEMPERATURES[-1]:.3g} and {float((lower / entropy)[TEMPERATURES.tolist().index(1)].mean()):.1%} at T = 1.",
)
inside = (least >= least_bound * (1 - slack)) & (largest <= largest_bound * (1 + slack))
verdict("no weight leaves the bounds of dispersion", bool(inside.all()), f"{least.size * n} weights.")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
for name, numbers, colour, marker in (
    ("entropy", entropy, COLOURS[0], "o"),
    ("its lower bound", lower, COLOURS[1], "s"),
):
    drawn(left, TEMPERATURES, by_seed(numbers.mean(-1)), None, name, colour, marker)
for name, numbers, colour, marker in (
    ("largest weight", largest, COLOURS[0], "o"),
    ("its upper bound", jnp.minimum(largest_bound, 1), COLOURS[1], "s"),
    ("least weight", least, COLOURS[2], "^"),
    ("its lower bound", least_bound, COLOURS[3], "v"),
):
    drawn(right, TEMPERATURES, by_seed(jnp.exp(jnp.log(numbers).mean(-1))), None, name, colour, marker)
left.set(title="entropy (nats), means over rows", xlabel="temperature")
right.set(title="weights, geometric means over rows", xlabel="temperature", yscale="log", ylim=(1e-9, 2))
for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Which scale for which head size
#
# Independent queries and keys give $q \cdot k$ a variance of $H$: the scale $1 / \sqrt{H}$ keeps their spread at one.
# Training aligns them: a key that is wanted has a part in common with its query, which adds $\rho H$ to their
# score, and then it is the scale $1 / H$ that keeps the logit's size (Yang et al., arXiv 2203.03466). Below, key $i$
# is $\rho\, q_i + \sqrt{1 - \rho^2}$ noise, with $\rho = 1/2$ on the right. With $s = \beta \sqrt{H}$, theory says
#
# $$\log n - \text{entropy} \approx s^2 / 2, \qquad
#   p_{ii} \approx \frac{e^{\beta \rho H}}{e^{\beta \rho H} + (n - 1)\, e^{s^2 / 2}}.$$
#
# From $s = \sqrt{2 \log n}$ on the entropy is 0, and the sum over rivals is their maximum, $e^{s \sqrt{2 \log n}}$.

# %%
SIZES, RHO = np.array([8, 32, 128, 512]), 0.5


@jax.jit
def scale_numbers(q, k, scales):
    """Mean entropy, and mean weight of key i for query i, of each head, `SEEDS N`."""
    p = attention.attention_steps(q, k, k, scale=scales).weights
    entropy = -jnp.where(p > 0, p * jnp.log(p), 0).sum(-1).mean(-1)
    return entropy, jnp.diagonal(p, axis1=-2, axis2=-1).mean(-1)


RULES = {"1": lambda H: 1.0, "$1/\\sqrt{H}$": lambda H: H**-0.5, "1/H": lambda H: 1.0 / H}
entropies, own_weights = [], []
for size in SIZES:
    one_q, noise = jax.random.normal(jax.random.fold_in(jax.random.key(2), size), (2, SEEDS, 128, 1, size))
    scales = jnp.array([rule(size) for rule in RULES.values()])
    three_q, three_noise = (jnp.repeat(x, len(RULES), axis=2) for x in (one_q, noise))
    entropies.append(scale_numbers(three_q, three_noise, scales)[0])
    aligned = RHO * three_q + np.sqrt(1 - RHO**2) * three_noise
    own_weights.append(scale_numbers(three_q, aligned, scales)[1])
entropies, own_weights = np.array(entropies), np.array(own_weights)  # SIZES SEEDS RULES

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
for index, (name, rule) in enumerate(RULES.items()):
    beta = np.array([rule(size) for size in SIZES])
    s = beta * np.sqrt(SIZES)
    frozen = s > np.sqrt(2 * np.log(128))
    rivals = np.where(frozen, s * np.sqrt(2 * np.log(128)), np.log(127) + s**2 / 2)  # log of their sum of e^logit
    look = (name, COLOURS[index], "os^"[index])
    drawn(left, SIZES, np.log(128) - entropies[:, :, index].T, np.where(frozen, np.log(128), s**2 / 2), *look)
    drawn(right, SIZES, own_weights[:, :, index].T, 1 / (1 + np.exp(rivals - beta * RHO * SIZES)), *look)
left.set(title="independent: log n - entropy (nats)", xlabel="H", yscale="log")
right.set(title="aligned: weight of the wanted key", xlabel="H")
for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.legend(title="scale", fontsize=8)
plt.show()
known = np.log(128) - entropies.mean(1)  # SIZES RULES
change = known[-1] / known[0]
verdict(
    "for independent vectors 1/sqrt(H) keeps log n - entropy within a factor 1.5, the other rules do not",
    1 / 1.5 < change[1] < 1.5 < min(change[0], 1 / change[2]),
    f"From H = {SIZES[0]} to {SIZES[-1]} it changes by a factor of "
    + ", ".join(f"{x:.3g} ({name})" for x, name in zip(change, ("1", "1/sqrt(H)", "1/H"), strict=True))
    + ".",
)
change = own_weights.mean(1)[-1] / own_weights.mean(1)[0]
verdict(
    "for aligned vectors 1/H keeps the weight of the wanted key within a factor 2, 1/sqrt(H) does not",
    0.5 < change[2] < 2 < change[1],
    f"From H = {SIZES[0]} to {SIZES[-1]} it changes by a factor of {change[2]:.2f} with 1/H, {change[1]:.2f} with "
    f"1/sqrt(H). But with 1/H it is {own_weights.mean(1)[-1][2]:.3f}, near 1/n = {1 / 128:.3f}: "
    "the rule needs a factor beside it.",
)

# %% [markdown]
# ## Length
#
# A key whose logit is $\Delta$ above all others has the weight $e^\Delta / (e^\Delta + n - 1)$: at a fixed temperature
# it drowns as $n$ grows. SSMax (arXiv 2501.19399) lets the scale grow with length, $\beta = s \log n$, and the weight
# becomes $n^{s \Delta} / (n^{s \Delta} + n - 1)$, which tends to 1 if $s \Delta > 1$. The paper's example goes from 10
# to 100,000 keys. It gives the weights at both ends; two of them fix $\Delta$ and $s$, and the other two are then
# predictions to check.
#
# The other keys of real attention have no equal logits. With normal noise of variance 1 on them, the largest rival
# comes to $\sqrt{2 \log n}$, and a growing scale favours the rival too, as soon as that exceeds $\Delta$.

# %%
PAPER = {"plain": (0.943, 0.0015), "ssmax": (0.940, 1.0)}  # weights at 10 and at 100,000 keys
LENGTHS = np.array([10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000])
gap = np.log(PAPER["plain"][0] / (1 - PAPER["plain"][0]) * 9)
strength = np.log(PAPER["ssmax"][0] / (1 - PAPER["ssmax"][0]) * 9) / (gap * np.log(10))
noise = jax.random.normal(jax.random.key(3), (2 * SEEDS, LENGTHS[-1], 1, 1)).at[:, 0].set(gap)
quiet = jnp.zeros_like(noise[:1]).at[:, 0].set(gap)


@jax.jit
def first_weight(logits, length, scales):
    """The weight of the first of `length` keys at each scale, `B N`, for a query of 1 and keys that are the logits."""
    query = jnp.ones((logits.shape[0], 1, len(scales), 1))
    first = (jnp.arange(logits.shape[1]) == 0).astype(logits.dtype)[None, :, None, None]
    lengths = jnp.full(len(logits), length)
    value = jnp.broadcast_to(first, logits.shape)
    options = {"scale": scales, "key_value_seq_lengths": lengths}
    return attention.dot_product_attention(query, logits, value, **options)[:, 0, :, 0]


def over_lengths(logits):
    rows = [first_weight(logits, n, jnp.array([1.0, strength * np.log(n)])) for n in LENGTHS]
    return np.moveaxis(np.array(rows), 0, -1)  # B, plain or SSMax, LENGTHS


without, with_noise = over_lengths(quiet), over_lengths(noise)
figure, axes = plt.subplots(figsize=(7, 3.4))
for index, (name, power) in enumerate(
    {"plain": np.full(len(LENGTHS), gap), "SSMax": strength * gap * np.log(LENGTHS)}.items()
):
    theory = 1 / (1 + (LENGTHS - 1) * np.exp(-power))
    drawn(axes, LENGTHS, without[:, index], theory, name, COLOURS[index])
    drawn(
        axes,
        LENGTHS,
        with_noise[:, index],
        None,
        f"{name}, noisy rivals (range of {2 * SEEDS} draws)",
        COLOURS[2 + index],
        "s",
    )
axes.set(xscale="log", xlabel="keys", title="weight of the key that is wanted")
axes.legend(fontsize=8)
plt.show()

found = {"plain": without[0, 0], "ssmax": without[0, 1]}
verdict(
    "the paper's plain softmax disperses and its SSMax does not",
    all(abs(found[name][end] - PAPER[name][end]) < 6e-4 for name in PAPER for end in (0, -1)),
    "From 10 to 100,000 keys: "
    + "; ".join(
        f"{name} {x[0]:.3f} to {x[-1]:.4f} (paper {PAPER[name][0]} to {PAPER[name][1]})" for name, x in found.items()
    )
    + f", with a gap of {gap:.2f} and s = {strength:.3f}.",
)
noisy = with_noise[:, 1, -1]
verdict(
    "SSMax keeps the weight above 0.9 when the rivals are noisy",
    bool((noisy > 0.9).all()),
    f"At 100,000 keys it is {np.median(noisy):.3f} in the median draw, {noisy.min():.3f} to {noisy.max():.3f} in all; "
    f"the rivals' expected maximum is {np.sqrt(2 * np.log(LENGTHS[-1])):.2f}, the gap {gap:.2f}. Plain softmax has "
    f"{np.median(with_noise[:, 0, -1]):.4f}.",
)

# %% [markdown]
# ## Soft cap and QK-norm
#
# In training, queries and keys may grow, and logits with the square of that. Two levers bound them:
#
# - a **soft cap** $c \tanh(l / c)$ never lets a logit exceed $c$ (`logits_soft_cap`);
# - **QK-norm** makes queries and keys unit vectors, so that a logit is at most the scale.
#
# Whether that makes attention stable has an exact form: if no logit moves by more than $D$, the total variation
# between the weights before and after is at most $\tanh(D / 2)$. Below, queries and keys are multiplied by $g$, and
# then rounded to bfloat16, which moves their logits by a relative $2^{-8}$ or so. QK-norm starts with the spread that
# the others have at $g = 1$.

# %%
GROWTH, CAP = 2.0 ** np.arange(0, 6.5, 1), 20.0
start_q, start_k = jax.random.normal(jax.random.key(4), (2, SEEDS, 128, 1, H))


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


LEVERS = {
    "plain": lambda q, k: (q, k, {}),
    f"soft cap {CAP:.0f}": lambda q, k: (q, k, {"logits_soft_cap": CAP}),
    "QK-norm": lambda q, k: (unit(q), unit(k), {"scale": np.sqrt(H)}),
}


def under(lever, q, k):
    """Logits and weights `B N T S` under a lever."""
    q, k, options = LEVERS[lever](q, k)
    steps = attention.attention_steps(q, k, k, **options)
    return steps.masked_scores, steps.weights


@jax.jit(static_argnames="lever")
def stability(q, k, *, lever):
    """Of each batch element largest logit, entropy, trace, keys near the largest; of each row TV under rounding, D."""
    logits, p = under(lever, q, k)
    low = jnp.bfloat16
    moved_logits, moved = under(lever, q.astype(low).astype(q.dtype), k.astype(low).astype(k.dtype))
    entropy = -jnp.where(p > 0, p * jnp.log(p), 0).sum(-1).mean((1, 2))
    trace = 1 - (p**2).sum(-1).mean((1, 2))
    shift = jnp.abs(moved_logits - logits).max(-1)
    alike = (logits > logits.max(-1, keepdims=True) - 0.1).mean((1, 2, 3))
    return jnp.abs(logits).max((1, 2, 3)), entropy, trace, alike, jnp.abs(moved - p).sum(-1) / 2, shift


table = {name: [stability(g * start_q, g * start_k, lever=name) for g in GROWTH] for name in LEVERS}
table = {name: [np.array(column) for column in zip(*rows, strict=True)] for name, rows in table.items()}
figure, grid = plt.subplots(1, 4, figsize=(14, 3.2))
titles = [
    "largest logit",
    "entropy (nats)",
    "trace of softmax's derivative",
    "total variation in bfloat16, worst row",
]
for index, (name, (top, entropy, trace, _, variation, shift)) in enumerate(table.items()):
    for axes, numbers in zip(grid, (top, entropy, trace, variation.max((2, 3))), strict=True):
        drawn(axes, GROWTH, numbers.T, None, name, COLOURS[index], "os^"[index])
    grid[3].plot(GROWTH, np.tanh(shift / 2).max((1, 2, 3)), color=COLOURS[index], linestyle="--")
grid[0].plot(GROWTH, table["plain"][0][0].mean() * GROWTH**2, color=COLOURS[0], label="theory: $g^2$")
grid[0].set_yscale("log", base=2)
grid[3].set_yscale("log")
grid[3].plot([], [], color="gray", linestyle="--", label="bound: tanh(D / 2)")
for axes, title in zip(grid, titles, strict=True):
    axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel="growth g of queries and keys")
grid[0].legend(fontsize=8)
grid[3].legend(fontsize=8)
plt.show()

moves, limits = (np.concatenate([x[index].ravel() for x in table.values()]) for index in (4, 5))
limits = np.tanh(limits / 2)
verdict(
    "the weights move by no more than tanh(D / 2) in any row",
    bool((moves <= limits + 128 * float(jnp.finfo(jnp.float32).eps)).all()),
    f"{moves.size} rows; where the bound is above 0.01, the median share of it is "
    f"{np.median((moves / np.maximum(limits, 0.01))[limits > 0.01]):.2f} and the largest "
    f"{(moves / np.maximum(limits, 0.01))[limits > 0.01].max():.2f}.",
)
worst = {name: x[4].max() for name, x in table.items()}
for name in list(LEVERS)[1:]:
    verdict(
        f"{name} keeps every row within a tenth of the worst total variation that plain softmax comes to",
        worst[name] < worst["plain"] / 10,
        f"Worst row at any g: {worst[name]:.3f} against {worst['plain']:.3f}. Entropy at g = {GROWTH[-1]:.0f}: "
        f"{table[name][1][-1].mean():.2f} against {table['plain'][1][-1].mean():.2f} nats; "
        f"{table[name][3][-1].mean():.0%} of the keys have a logit within 0.1 of the row's largest, at g = 1 "
        f"{table[name][3][0].mean():.0%}.",
    )

# %% [markdown]
# A cap keeps logits small by making large ones equal: if queries and keys grow enough, all keys that agree with the
# query at all come to stand at the cap, and their order is lost. QK-norm does not see the growth.
#
# ## Which approximation is valid where
#
# Every method that is registered (`attention.METHODS`), on the same independent normal operands and all temperatures at
# once; random constants are drawn, trained parameters are as they start. Those that read some of the keys have a budget
# of about a quarter of the 256, the others their default. The error of a row is relative to the mean size of an exact
# output at that temperature:
#
# $$\text{error} = \frac{\text{mean}_i |\hat o_i - o_i|}{\text{mean}_i |o_i|}.$$
#
# An error of 1 is what the answer 0 would have. Where a method certifies its output, the second table has the mean of
# its bounds in the same unit: what one would know of the error without the exact output. ∞ is a bound that says
# nothing.

# %%
GRID = 2.0 ** np.arange(-3, 4.5, 1)
heads = np.tile(GRID, SEEDS)
grid_q, grid_k, grid_v = (jnp.repeat(x, len(GRID), axis=2) for x in (q, k, v))
exact = attention.dot_product_attention(grid_q, grid_k, grid_v, temperature=heads)


def over_seeds(numbers):
    """Means over rows and seeds of what is `1 T N`, one for each temperature."""
    return np.asarray(numbers, np.float64).mean((0, 1)).reshape(SEEDS, len(GRID)).mean(0)


unit_of_error = over_seeds(jnp.linalg.norm(exact, axis=-1))


def measure(method):
    """Errors and mean bounds of a method, one for each temperature; None where it refuses the call."""
    params = method.init(jax.random.key(5), num_heads=len(heads), head_dim=H)
    try:
        output, certificate = attention.certified_attention(
            grid_q, grid_k, grid_v, temperature=heads, method=method, params=params
        )
    except attention.UnsupportedError as refusal:
        print(f"{method!r} refuses this call and is left out: {refusal}")
        return None
    error = jnp.linalg.norm(output - exact, axis=-1)
    if certificate.kind != "none":
        # The exact output is itself rounded, so that it counts for twice the bound of the exact method.
        broken[repr(method)] = int((error > certificate.error_bound + exact_bound).sum())
        print(f"{method!r}: certificate {certificate.kind}, {broken[repr(method)]} of {error.size} bounds broken")
    return over_seeds(error) / unit_of_error, over_seeds(certificate.error_bound) / unit_of_error


QUARTER = (
    attention.BlockTopK(blocks=4, block_size=16, query_block=16),
    attention.Hashed(bucket=8, window=8),
    attention.LocalChunked(chunk=n // 8),
    attention.Sampled(samples=n // 4, window=8),
    attention.SlidingWindow(window=n // 8),
)
broken = {}
exact_bound = attention.certified_attention(grid_q, grid_k, grid_v, temperature=heads)[1].error_bound
methods = {cls.__name__: cls() for cls in attention.METHODS.values()}
methods |= {type(method).__name__: method for method in QUARTER}
results = {name: measure(method) for name, method in methods.items()}
results = {name: numbers for name, numbers in results.items() if numbers is not None}
verdict(
    "no certificate is broken",
    not any(broken.values()),
    f"{sum(broken.values())} of {len(broken) * exact_bound.size} bounds.",
)


# %%
def short_number(x):
    if not np.isfinite(x) or x == 0:
        return "0" if x == 0 else "∞"
    return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e") if x < 0.0095 or x >= 99.5 else f"{x:.2g}"


figure, grid = plt.subplots(1, 2, figsize=(13.5, 0.36 * len(results) + 1.3), sharey=True)
for axes, which, title in ((grid[0], 0, "error"), (grid[1], 1, "certified: mean error bound")):
    table_of = np.array([numbers[which] for numbers in results.values()])
    shades = np.log10(np.clip(np.where(np.isfinite(table_of), table_of, 1e2), 1e-6, 1e2))
    image = axes.imshow(shades, cmap="cividis", vmin=-6, vmax=2, aspect="auto")
    for (row, column), x in np.ndenumerate(table_of):
        colour = "white" if shades[row, column] < -2 else "black"
        axes.text(column, row, short_number(x), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(GRID)), [f"{T:g}" for T in GRID])
    axes.set_yticks(range(len(results)), list(results))
    axes.set(title=title, xlabel="temperature")
    axes.spines[:].set_visible(False)
figure.colorbar(image, ax=grid, label="log10 of the error")
plt.show()

VALID = 0.1
for name, (errors, bounds) in results.items():
    good, certain = (", ".join(f"{T:g}" for T in GRID[x < VALID]) for x in (errors, bounds))
    print(f"{name:14} error below {VALID:.0%} at T = {good or 'none':38} certified at T = {certain or 'none'}")

# %% [markdown]
# ## Two ends of the temperature
#
# Keeping the largest weights works where they are all that counts; random features work where no weight counts more
# than another. Both errors can be predicted from the exact weights. For normal values that are independent of the
# weights the relative error of weights $\hat p$ is $\sqrt{\sum (\hat p - p)^2 / \sum p^2}$.
#
# - Top-$k$ drops the mass $\tau$ and divides the rest by $1 - \tau$, so $\hat p - p$ is $p \tau / (1 - \tau)$ on the
#   kept keys and $-p$ on the others.
# - FAVOR+ estimates $e^{x \cdot y}$ without bias and with the relative variance $(e^{|x + y|^2} - 1) / M$ for
#   independent features (Choromanski et al., arXiv 2009.14794, lemma 2), so that the error is about
#   $\sqrt{\sum p^2 (e^{|x + y|^2} - 1) / (M \sum p^2)}$ while that is small. With $x = q \sqrt{\beta}$ and
#   $y = k \sqrt{\beta}$, $|x + y|^2$ is about $2 \sqrt{H} / T$: the features needed grow as $e^{1 / T}$.

# %%
TOP, FEATURES = attention.TopK(k=16), attention.Performer(features=256, coupling="iid")


@jax.jit
def predicted(q, k):
    """The two errors from the exact weights, and the dropped mass, of each head."""
    steps = attention.attention_steps(q, k, k, temperature=heads)
    p = steps.weights[0]
    squares = (p**2).sum(-1)
    kept = p >= jax.lax.top_k(p, TOP.k)[0][..., -1:]
    tau = jnp.where(kept, 0, p).sum(-1)
    top = jnp.where(kept, p * (tau / (1 - tau))[..., None], p)
    beta = 1 / (np.sqrt(H) * heads)
    lengths = (q[0] ** 2).sum(-1).T[:, :, None] + (k[0] ** 2).sum(-1).T[:, None, :]
    exponent = jnp.clip(beta[:, None, None] * lengths + 2 * steps.scaled_scores[0], 0, 80)
    noise = (p**2 * jnp.expm1(exponent)).sum(-1) / FEATURES.features
    size = jnp.sqrt(squares).mean(-1)
    return jnp.sqrt((top**2).sum(-1)).mean(-1) / size, jnp.sqrt(noise).mean(-1) / size, tau.mean(-1)


top_theory, feature_theory, dropped = (np.asarray(x).reshape(SEEDS, -1).mean(0) for x in predicted(grid_q, grid_k))
top_error, feature_error = measure(TOP)[0], measure(FEATURES)[0]
figure, axes = plt.subplots(figsize=(7, 3.4))
for name, error, theory, colour, marker in (
    (repr(TOP), top_error, top_theory, COLOURS[0], "o"),
    (repr(FEATURES), feature_error, np.where(feature_theory < 1, feature_theory, np.nan), COLOURS[1], "s"),
):
    drawn(axes, GRID, error[None], theory, name, colour, marker)
axes.plot(GRID, dropped, color="gray", linestyle=":", label="mass that top-k drops")
axes.axhline(VALID, color="black", linewidth=0.6)
axes.set_xscale("log", base=2)
axes.set(yscale="log", xlabel="temperature", title="relative error; lines: theory")
axes.legend(fontsize=8)
plt.show()
verdict(
    "the error of top-k falls with the temperature, all the way",
    bool((np.diff(top_error) > 0).all()),
    f"From {top_error[-1]:.2f} at T = {GRID[-1]:g} to {top_error[0]:.4f} at T = {GRID[0]:g}.",
)
hot = GRID >= 1
verdict(
    "the error of random features rises as the temperature falls to 1",
    bool((np.diff(feature_error[hot]) < 0).all()),
    f"From {feature_error[-1]:.3f} at T = {GRID[-1]:g} to {feature_error[hot][0]:.2f} at T = 1. Below that it is "
    f"{feature_error[0]:.2f} to {feature_error[~hot].max():.2f}: the answer no longer depends on the question.",
)
off = np.abs(top_error / top_theory - 1).max()
verdict("theory predicts the error of top-k within 10%", off < 0.1, f"Largest deviation {off:.1%}.")
small = feature_theory < 0.5
off = np.abs(feature_error / feature_theory - 1)[small]
verdict(
    "theory predicts the error of random features within 30% where it predicts less than 0.5",
    bool(small.any() and off.max() < 0.3),
    f"At T = {', '.join(f'{T:g}' for T in GRID[small])} it is off by {off.max():.0%} at most.",
)
