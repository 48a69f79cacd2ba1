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
# # Scaled dot-product attention, looked at and checked
#
# Attention lets each word of a sentence gather what it needs from the other words:
#
# $$\mathrm{attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{H}}\right) V$$
#
# This notebook takes the formula apart on three sentences, first with random weights and then with a small model that
# is trained here. On the way it checks three things that are often said about attention:
#
# 1. a word is most similar to itself;
# 2. in *The dog found some pizza next to the baby and ate it*, "it" attends to the pizza;
# 3. without the division by $\sqrt{H}$ the softmax saturates.
#
# Each check prints what it measured and whether the claim holds. Axis letters: `B` batch, `T` words that look
# (queries), `S` words that are looked at (keys), `N` heads, `H` size of a head (often called $d_k$), `D` size of an
# embedding.

# %%
import itertools
import textwrap

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import attention
from attention.flax import MultiHeadAttention
from attention.positions import sinusoids

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito: told apart by all readers
plt.rcParams |= {"figure.dpi": 72, "figure.constrained_layout.use": True, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}

SENTENCES = ["I am good", "Let's go", "The dog found some pizza next to the baby and ate it"]


def words_of(sentence):
    return sentence.lower().split()


def verdict(claim, holds, measured):
    text = f"{'HOLDS' if holds else 'DOES NOT HOLD'}: {claim}. {measured}"
    print(textwrap.fill(text, 110, subsequent_indent="    "))


def listed(items):
    return ", ".join(item if isinstance(item, str) else f"{item:.3g}" for item in items)


def heatmap(axes, matrix, words, title, **options):
    options = {"cmap": "viridis", "vmin": 0, "vmax": 1} | options
    image = axes.imshow(matrix, **options)
    axes.set_xticks(range(len(words)), words, rotation=90)
    axes.set_yticks(range(len(words)), words)
    axes.set_title(title, fontsize=9)
    axes.spines[:].set_visible(False)
    return image


# %% [markdown]
# ## From words to queries, keys and values
#
# A word becomes a vector of `D` numbers, its embedding. As attention itself does not know in which order the words
# stand, a pattern of sines and cosines that belongs to the position is added. Three matrices make of each sum $x$ a
# **query** (what the word looks for), a **key** (what it offers to be found by) and a **value** (what it passes on):
#
# $$q = x W_Q, \qquad k = x W_K, \qquad v = x W_V.$$
#
# In a model all of this is learned. Here, to begin with, it is drawn at random. There is one head, with $H = D$.

# %%
D = 96
vocabulary = sorted({word for sentence in SENTENCES for word in words_of(sentence)})
draw_embedding, draw_weights, *keys = jax.random.split(jax.random.key(0), 5)
embedding = jax.random.normal(draw_embedding, (len(vocabulary), D))


def embedded(sentence, with_positions=True):
    """The vectors of a sentence, `T D`."""
    numbers = jnp.array([vocabulary.index(word) for word in words_of(sentence)])
    return embedding[numbers] + with_positions * sinusoids(jnp.arange(len(numbers)), D)


def projected(x, weights):
    """Query, key and value of one head, each `T 1 H`; a column has variance 1 / D, so that q and k keep that of x."""
    return [(x @ w)[:, None, :] for w in weights]


weights = jax.random.normal(draw_weights, (3, D, D)) / np.sqrt(D)
for sentence in SENTENCES:
    q, k, v = projected(embedded(sentence), weights)
    steps = attention.attention_steps(q, k, v)
    print(f"{sentence!r}: x {embedded(sentence).shape}, q {q.shape}, scores {steps.scores.shape}, {steps.output.shape}")

# %% [markdown]
# `attention.attention_steps` returns every intermediate result: `scores` $= Q K^\top$, `scaled_scores`,
# `masked_scores`, `weights` after the softmax, and the `output`. The rows of a matrix are the words that look, its
# columns the words that are looked at.

# %%
figure, grid = plt.subplots(3, 4, figsize=(13, 10.5), height_ratios=[1, 1, 2.2])
for row, sentence in zip(grid, SENTENCES, strict=True):
    words, x = words_of(sentence), embedded(sentence)
    steps = attention.attention_steps(*projected(x, weights))
    shown = [
        ("embeddings and positions: $X X^\\top$", x @ x.T, None),
        ("scores: $Q K^\\top$", steps.scores[0], None),
        ("scaled: $Q K^\\top / \\sqrt{H}$", steps.scaled_scores[0], None),
        ("weights: softmax of each row", steps.weights[0], (0, 1)),
    ]
    for axes, (title, matrix, limits) in zip(row, shown, strict=True):
        size = float(jnp.abs(matrix).max())
        low, high = limits or (-size, size)
        image = heatmap(axes, matrix, words, title, vmin=low, vmax=high, cmap="viridis" if limits else "PuOr")
        figure.colorbar(image, ax=axes, shrink=0.7)
plt.show()

# %% [markdown]
# ## Claim 1: a word is most similar to itself
#
# In the left column it looks true. But attention does not compare embeddings with each other: it compares queries with
# keys, and $W_Q$ and $W_K$ are different matrices. So we count, over many draws of embeddings and weights, in how many
# rows the largest entry is that of the word itself. With $S$ words to choose from, chance would give $1 / S$.

# %%
DRAWS = 500


def self_first(scores):
    """For `... T S` scores: whether a word's score with itself is larger than with every other word."""
    own = jnp.eye(scores.shape[-1], dtype=bool)
    others = jnp.where(own, -jnp.inf, scores).max(-1)
    return jnp.diagonal(scores, axis1=-2, axis2=-1) > others


def drawn_scores(sentence, rng, with_positions, tied):
    """Scores of `DRAWS` random embeddings and weights, `DRAWS T S`; tied: the keys are made by the queries' matrix."""
    words = words_of(sentence)
    first = jnp.array([words.index(word) for word in words])  # a word that occurs twice has one embedding
    for_x, for_q, for_k = jax.random.split(rng, 3)
    x = jax.random.normal(for_x, (DRAWS, len(words), D))[:, first]
    x += with_positions * sinusoids(jnp.arange(len(words)), D)[None]
    q = x @ (jax.random.normal(for_q, (DRAWS, D, D)) / np.sqrt(D))
    k = q if tied else x @ (jax.random.normal(for_k, (DRAWS, D, D)) / np.sqrt(D))
    return attention.attention_steps(q[:, :, None], k[:, :, None], k[:, :, None]).scores[:, 0]


print(f"{'':54}{'no positions':>14}{'positions':>11}{'positions,':>12}{'chance':>9}")
print(f"{'':54}{'Wk = Wq':>14}{'Wk = Wq':>11}{'Wk != Wq':>12}")
shares, chances, errors = [], [], []
for sentence in SENTENCES:
    row = [self_first(drawn_scores(sentence, keys[0], *case)) for case in ((False, True), (True, True), (True, False))]
    tied_plain, tied, untied = (float(x.mean()) for x in row)
    shares.append((tied_plain, tied, untied))
    chances.append(1 / len(words_of(sentence)))
    errors.append(float(row[2].mean(-1).std()) / np.sqrt(DRAWS))  # draws are independent, rows of a draw are not
    print(f"{sentence:54}{tied_plain:14.3f}{tied:11.3f}{untied:12.3f}{chances[-1]:9.3f}")
print()
verdict(
    "a word is most similar to itself where one matrix makes both queries and keys",
    min(tied for _, tied, _ in shares) > 0.9,
    f"Smallest share: {min(tied for _, tied, _ in shares):.3f} with positions. Without them it is "
    f"{shares[2][0]:.3f} in the long sentence, whose two words 'the' are then the same vector.",
)
verdict(
    "a word is most similar to itself under the untrained weights of attention",
    all(untied > 0.5 for _, _, untied in shares),
    "Shares: "
    + ", ".join(
        f"{untied:.3f} ± {2 * error:.3f} (chance {chance:.3f})"
        for (_, _, untied), error, chance in zip(shares, errors, chances, strict=True)
    )
    + ". With two different random matrices the diagonal is a column like any other.",
)

# %% [markdown]
# ## Division by $\sqrt{H}$
#
# If the entries of $q$ and $k$ are independent with mean 0 and variance 1, then $q \cdot k$ is a sum of $H$ products,
# each of variance 1:
#
# $$\mathrm{Var}(q \cdot k) = H, \qquad \mathrm{Var}\!\left(\frac{q \cdot k}{\sqrt{H}}\right) = 1.$$
#
# Softmax is a function of differences of scores. At a spread of $\sqrt{H}$ the largest takes it all, and nothing is
# left to learn from: the derivative of the weights $p$ by the scores is $\mathrm{diag}(p) - p p^\top$, and its trace,
#
# $$\sum_j p_j (1 - p_j) = 1 - \sum_j p_j^2,$$
#
# goes to 0 as one weight goes to 1. (Two equal weights of 1/2 give 1/2, twelve equal ones 11/12.)

# %%
SIZES, S = np.array([4, 8, 16, 32, 64, 128, 256, 512, 1024]), len(words_of(SENTENCES[2]))


@jax.jit
def softmax_numbers(scores):
    """The variance of the scores; means over rows: entropy, largest weight, trace of softmax's derivative."""
    p = jax.nn.softmax(scores)
    entropy = -jnp.where(p > 0, p * jnp.log(p), 0).sum(-1)
    return jnp.stack([scores.var(), entropy.mean(), p.max(-1).mean(), (1 - (p**2).sum(-1)).mean()])


measured = {"unscaled": [], "scaled": []}
for H in SIZES:
    q, k = jax.random.normal(jax.random.fold_in(keys[1], H), (2, 200, S, 1, H))
    steps = attention.attention_steps(q, k, k)
    measured["unscaled"].append(softmax_numbers(steps.scores))
    measured["scaled"].append(softmax_numbers(steps.scaled_scores))
measured = {name: np.array(rows).T for name, rows in measured.items()}

figure, grid = plt.subplots(1, 4, figsize=(13, 3))
titles = [
    "variance of the scores",
    "entropy of a row (nats)",
    "largest weight of a row",
    "trace of softmax's derivative",
]
for axes, title, *lines in zip(grid, titles, *measured.values(), strict=True):
    for name, line, colour, marker in zip(measured, lines, (ORANGE, BLUE), "so", strict=True):
        axes.plot(SIZES, line, marker=marker, linestyle="", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel="H")
grid[0].plot(SIZES, SIZES, color=ORANGE, label="theory: H")
grid[0].plot(SIZES, np.ones(len(SIZES)), color=BLUE, label="theory: 1")
grid[0].set_yscale("log", base=2)
grid[1].axhline(np.log(S), color="gray", linestyle=":", label="log S, all weights equal")
grid[2].axhline(1 / S, color="gray", linestyle=":", label="1 / S")
grid[3].axhline(1 - 1 / S, color="gray", linestyle=":", label="1 - 1 / S")
for axes in grid:
    axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Claim 3: unscaled scores saturate the softmax
#
# We call a softmax saturated if the trace of its derivative has fallen below a quarter of the largest value that it
# can have, $1 - 1 / S$. Whether that happens is a matter of $H$ and of how large queries and keys are, so the check
# asks both of independent vectors and of the sentences with the random weights above, for heads of several sizes.

# %%
saturated_below = (1 - 1 / S) / 4
for H in (8, 1024):
    at = list(SIZES).index(H)
    trace = {name: rows[3][at] for name, rows in measured.items()}
    verdict(
        f"at H = {H}, unscaled scores of independent vectors saturate the softmax",
        trace["unscaled"] < saturated_below,
        f"Trace {trace['unscaled']:.3f} unscaled, {trace['scaled']:.3f} scaled; saturated below {saturated_below:.3f}. "
        f"Largest weight {measured['unscaled'][2][at]:.3f} against {measured['scaled'][2][at]:.3f}.",
    )
slope = np.polyfit(np.log(SIZES), np.log(measured["unscaled"][0]), 1)[0]
verdict(
    "the variance of unscaled scores grows in proportion to H",
    abs(slope - 1) < 0.05,
    f"Fitted exponent {slope:.3f}; the variance of scaled scores lies between {measured['scaled'][0].min():.3f} and "
    f"{measured['scaled'][0].max():.3f}.",
)
steps = attention.attention_steps(*projected(embedded(SENTENCES[2]), weights))
unscaled, scaled = softmax_numbers(steps.scores), softmax_numbers(steps.scaled_scores)
verdict(
    f"in the long sentence, H = {D}, unscaled scores saturate the softmax",
    unscaled[3] < saturated_below,
    f"Trace {unscaled[3]:.3f} unscaled, {scaled[3]:.3f} scaled. (These scores have variance {unscaled[0]:.0f}, more "
    f"than H, because embedding and position add up to vectors longer than sqrt(D).)",
)

# %% [markdown]
# ## Rows that sum to one, and weighted values
#
# Each row of weights is a distribution over the words: positive, with sum one. The output of a word is the mean of all
# values under that distribution, $o_i = \sum_j p_{ij} v_j$, and so it cannot leave the range of the values.

# %%
sentence = SENTENCES[2]
words = words_of(sentence)
q, k, v = projected(embedded(sentence), weights)
steps = attention.attention_steps(q, k, v)
sums = steps.weights.sum(-1)
by_hand = jnp.einsum("NTS,SNH->TNH", steps.weights, v)
whole = attention.dot_product_attention(q, k, v)
rounding = len(words) * float(jnp.finfo(jnp.float32).eps)
verdict(
    "rows sum to one",
    float(jnp.abs(sums - 1).max()) <= rounding,
    f"Largest deviation {float(jnp.abs(sums - 1).max()):.1e}; S roundings of float32 are {rounding:.1e}.",
)
verdict(
    "the weighted sum of the values, by hand, is what `attention.dot_product_attention` returns",
    bool(jnp.allclose(by_hand, whole, rtol=0, atol=rounding * float(jnp.abs(v).max()))),
    f"Largest difference {float(jnp.abs(by_hand - whole).max()):.1e}.",
)
inside = (whole >= v.min(0) - rounding * jnp.abs(v).max()) & (whole <= v.max(0) + rounding * jnp.abs(v).max())
verdict(
    "no coordinate of an output leaves the range of the values",
    bool(inside.all()),
    f"{inside.size} coordinates; the mean norm of an output is {float(jnp.linalg.norm(whole, axis=-1).mean()):.1f}, "
    f"that of a value {float(jnp.linalg.norm(v, axis=-1).mean()):.1f}: a mean of unrelated vectors is short.",
)

figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.4), width_ratios=[1, 2])
left.barh(range(len(words)), steps.weights[0, -1], color=BLUE)
left.invert_yaxis()
left.set_yticks(range(len(words)), words)
left.set(title='weights of "it" (untrained)', xlabel="weight")
contributions = steps.weights[0, -1][:, None] * v[:, 0]
size = float(jnp.abs(contributions).max())
stack = jnp.concatenate([contributions, whole[-1:, 0]])
image = right.imshow(stack, cmap="PuOr", vmin=-size, vmax=size, aspect="auto")
right.set_yticks(range(len(words) + 1), [*words, "sum: output"])
right.axhline(len(words) - 0.5, color="black")
right.set(title="weight times value, and their sum", xlabel="coordinate of the value")
figure.colorbar(image, ax=right)
plt.show()

# %% [markdown]
# ## Several heads
#
# One head gives each word one distribution. Several heads cut queries, keys and values into pieces of $H = D / N$
# coordinates and attend in each piece apart, so that a word can look at several places for several reasons. Below are
# 8 heads of 12 coordinates and 12 heads of 8. With random weights no head has a reason: the word that "it" looks at
# most is a matter of the draw.


# %%
def with_heads(x, num_heads):
    """Cuts `T 1 D` into `T N H`."""
    return x.reshape(x.shape[0], num_heads, -1)


def show_heads(weights, words, title, names=None):
    """One panel a head; over it the word at which the last word of the sentence looks most, and with what weight."""
    columns = len(weights) // 2
    figure, grid = plt.subplots(2, columns, figsize=(1.95 * columns + 0.6, 5.4), sharex=True, sharey=True)
    for head, axes in enumerate(grid.ravel()):
        row = weights[head, -1]
        top = int(row.argmax())
        name = f"{names[head]}\n" if names else ""
        title_of_head = f'{name}head {head}: "{words[-1]}" at\n"{words[top]}" ({float(row[top]):.2f})'
        image = heatmap(axes, weights[head], words, title_of_head)
    figure.colorbar(image, ax=grid, shrink=0.6, label="weight")
    figure.suptitle(title)
    plt.show()


for N in (8, 12):
    steps = attention.attention_steps(*(with_heads(y, N) for y in (q, k, v)))
    show_heads(steps.weights, words, f"{N} heads, random weights")

# %% [markdown]
# ## A small model with a reason to look
#
# When does a model need to know what "it" stands for? When it translates into a language whose pronouns have a gender.
# German is one: *der Hund*, *die Pizza*, *das Baby*; and "it" as an object is *ihn*, *sie* or *es*. Articles need the
# gender of the noun that follows them, "are" needs its subject, and the first word of "let's go", *gehen wir*, needs
# the second.
#
# So the model reads an English sentence and says one German word for each English word. All sentences are made here,
# by a grammar in which the verb decides what "it" is (one can eat the food and hug the animal, not the other way
# round), while the order of the two nouns and the subject decide nothing.

# %%
BEINGS = {"dog": "Hund m", "cat": "Katze f", "baby": "Baby n", "bird": "Vogel m", "mouse": "Maus f", "horse": "Pferd n"}
FOODS = {
    "pizza": "Pizza f",
    "soup": "Suppe f",
    "bread": "Brot n",
    "fruit": "Obst n",
    "cake": "Kuchen m",
    "rice": "Reis m",
}
FOUND = {"found": "fand", "saw": "sah", "noticed": "bemerkte"}
NEAR = {"next to": "direkt neben", "close to": "nahe bei"}
TO_FOOD = {"ate": "verzehrte", "tasted": "probierte", "finished": "leerte"}
TO_BEING = {"hugged": "umarmte", "kissed": "liebkoste", "woke": "weckte"}
SUBJECT, OBJECT = {"m": "der", "f": "die", "n": "das"}, {"m": "den", "f": "die", "n": "das"}
BESIDE, PRONOUN = {"m": "dem", "f": "der", "n": "dem"}, {"m": "ihn", "f": "sie", "n": "es"}
HELD_OUT = {
    ("baby", "pizza"),
    ("dog", "soup"),
    ("cat", "bread"),
    ("bird", "fruit"),
    ("mouse", "cake"),
    ("horse", "rice"),
}


def story(subject, being, food, food_first, found, near, verb):
    """An English sentence, its German words, and the places of what "it" stands for and of the other noun."""
    (subject_de, s), (being_de, b), (food_de, f) = (w.split() for w in (BEINGS[subject], BEINGS[being], FOODS[food]))
    pair = [f"some {food}", f"the {being}"]
    pair_de = [f"etwas {food_de}", f"{(BESIDE if food_first else OBJECT)[b]} {being_de}"]
    first, second = pair if food_first else pair[::-1]
    first_de, second_de = pair_de if food_first else pair_de[::-1]
    eaten = verb in TO_FOOD
    english = f"the {subject} {found} {first} {near} {second} and {verb} it"
    german = f"{SUBJECT[s]} {subject_de} {FOUND[found]} {first_de} {NEAR[near]} {second_de} und "
    german += f"{(TO_FOOD | TO_BEING)[verb]} {PRONOUN[f if eaten else b]}"
    return english, german, *((4, 8) if eaten == food_first else (8, 4))


def stories(held_out):
    """All sentences whose pair of nouns is held out of training, or all others."""
    nouns = [pair for pair in itertools.product(BEINGS, FOODS) if (pair in HELD_OUT) == held_out]
    choices = list(itertools.product(BEINGS, (True, False), FOUND, NEAR, TO_FOOD | TO_BEING))
    return [story(subject, *pair, *rest) for pair in nouns for subject, *rest in choices if subject != pair[0]]


AM = {"i am": "ich bin", "you are": "du bist", "we are": "wir sind", "they are": "sie sind"}
GOOD = {"good": "gut", "happy": "froh", "hungry": "hungrig", "brave": "tapfer"}
GO = {"go": "gehen", "eat": "essen", "sing": "singen", "dance": "tanzen"}
short = [(f"{en} {good}", f"{de} {gut}") for (en, de), (good, gut) in itertools.product(AM.items(), GOOD.items())]
short += [(f"let's {go}", f"{gehen} wir") for go, gehen in GO.items()]
seen, unseen = stories(held_out=False), stories(held_out=True)

print(f"{len(seen)} stories to learn from, {len(unseen)} held out (their pairs of nouns are new); {len(short)} short")
for english, german in (short[0], short[-4], *(x[:2] for x in unseen if x[0] == " ".join(words))):
    print(f"    {english}\n    {german}")

# %% [markdown]
# *The dog found some pizza next to the baby and ate it* is among the held-out sentences: the model never sees a pizza
# next to a baby. Its three nouns have three genders, so that the German pronoun tells which one the model has in mind.
#
# The model is a small transformer: embeddings and positions as above, then two layers, each of which adds
# attention and then a two-layer network to what it is given. Sentences of different lengths are padded;
# `key_value_seq_lengths` says how long each really is.

# %%
LENGTH, LAYERS, STEPS, SEEDS = len(words), 2, 250, 3
ENGLISH = ["", *sorted({word for english, *_ in seen + short for word in english.split()})]
GERMAN = ["", *sorted({word for _, german, *_ in seen + short for word in german.split()})]


class Layer(nnx.Module):
    def __init__(self, num_heads, rngs):
        self.attention = MultiHeadAttention(D, num_heads, rngs=rngs)
        self.before_attention, self.before_network = nnx.RMSNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)


class Translator(nnx.Module):
    """One German word for each English word."""

    def __init__(self, num_heads, rngs):
        self.embedding = nnx.Embed(len(ENGLISH), D, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.layers = nnx.List([Layer(num_heads, rngs) for _ in range(LAYERS)])
        self.norm, self.german = nnx.RMSNorm(D, rngs=rngs), nnx.Linear(D, len(GERMAN), rngs=rngs)

    def __call__(self, tokens, scale=None, mask=None):
        """Logits `B T W` of the German words, and the query, key and value of each layer."""
        x, seen = self.embedding(tokens) + sinusoids(jnp.arange(LENGTH), D)[None], []
        for layer in self.layers:
            seen.append(layer.attention.projected(layer.before_attention(x)))
            x += layer.attention.attended(*seen[-1], scale=scale, mask=mask, key_value_seq_lengths=lengths_of(tokens))
            x += layer.down(jax.nn.gelu(layer.up(layer.before_network(x))))
        return self.german(self.norm(x)), seen


def lengths_of(tokens):
    return (tokens > 0).sum(-1)


def numbers(sentences, known):
    """Sentences as numbers, `B T`; 0 is padding."""
    rows = [[known.index(word) for word in sentence.split()] for sentence in sentences]
    return jnp.array([row + [0] * (LENGTH - len(row)) for row in rows])


def examples(pairs):
    return numbers([pair[0] for pair in pairs], ENGLISH), numbers([pair[1] for pair in pairs], GERMAN)


stories_seen, stories_unseen, short_ones = examples(seen), examples(unseen), examples(short)
places = np.array([pair[2:] for pair in unseen])  # of the referent and of the other noun

# %% [markdown]
# Training: 56 stories and 8 short sentences a step, Adam. The seed draws weights and batches; the scale is an
# argument, so that the model can be trained with $1 / \sqrt{H}$ and with 1 by the same program. `train` returns the
# weights before and after.


# %%
def loss_of(model, tokens, targets, scale):
    logits, _ = model(tokens, scale)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(targets > 0, losses, 0).sum() / (targets > 0).sum()


@jax.jit(static_argnames="num_heads")
def train(seed, scale, *, num_heads):
    for_model, for_batches = jax.random.split(jax.random.key(seed))
    graph, parameters = nnx.split(Translator(num_heads, nnx.Rngs(params=for_model)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, STEPS // 10, STEPS)
    optimizer = optax.adam(schedule)

    def step(state, rng):
        parameters, memory = state
        batch = []
        for pool, count, key in zip((stories_seen, short_ones), (56, 8), jax.random.split(rng), strict=True):
            rows = jax.random.randint(key, (count,), 0, len(pool[0]))
            batch.append([part[rows] for part in pool])
        tokens, targets = (jnp.concatenate(parts) for parts in zip(*batch, strict=True))
        loss, gradient = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), tokens, targets, scale))(parameters)
        updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(parameters, updates), memory), loss

    state = parameters, optimizer.init(parameters)
    (trained, _), losses = jax.lax.scan(step, state, jax.random.split(for_batches, STEPS))
    return parameters, trained, losses


@jax.jit(static_argnames="num_heads")
def look(parameters, tokens, scale, mask=None, *, num_heads):
    """Log-probabilities `B T W` of German words; scores and weights `L B N T S` of the layers."""
    graph = nnx.split(nnx.eval_shape(lambda: Translator(num_heads, nnx.Rngs(0))))[0]
    logits, seen = nnx.merge(graph, parameters)(tokens, scale, mask)
    steps = [attention.attention_steps(*qkv, scale=scale, key_value_seq_lengths=lengths_of(tokens)) for qkv in seen]
    return jax.nn.log_softmax(logits), jnp.stack([s.scores for s in steps]), jnp.stack([s.weights for s in steps])


SCALES = {(8, "scaled"): (D / 8) ** -0.5, (8, "unscaled"): 1.0, (12, "scaled"): (D / 12) ** -0.5}
models = {kind: [train(seed, scale, num_heads=kind[0]) for seed in range(SEEDS)] for kind, scale in SCALES.items()}

figure, axes = plt.subplots(figsize=(7, 2.8))
for (kind, trained), colour in zip(models.items(), (BLUE, ORANGE, GREEN), strict=True):
    for index, (_, _, losses) in enumerate(trained):
        axes.plot(losses, color=colour, linewidth=1, label=f"{kind[0]} heads, {kind[1]}" if index == 0 else None)
axes.set(yscale="log", xlabel="step", title="training loss (nats a word), one line a seed")
axes.legend()
plt.show()

PART = slice(None, None, 6)  # of the held-out stories
story_tokens, story_targets = stories_unseen[0][PART], stories_unseen[1][PART]
referents, others = places[PART].T
long_tokens, long_targets = examples([pair for pair in unseen if pair[0] == " ".join(words)])


def accuracy(kind, parameters):
    """The share of right German words in held-out stories, and of right pronouns."""
    right = look(parameters, story_tokens, SCALES[kind], num_heads=kind[0])[0].argmax(-1) == story_targets
    return float(right.mean()), float(right[:, -1].mean())


scores_of = {kind: np.array([accuracy(kind, after) for _, after, _ in trained]) for kind, trained in models.items()}
for kind, found in scores_of.items():
    shown = (f"{low:.3f} to {high:.3f}" for low, high in zip(found.min(0), found.max(0), strict=True))
    print(f"{kind[0]:2} heads, {kind[1]:8} right words {next(shown)}, right pronouns {next(shown)} ({SEEDS} seeds)")
verdict(
    "the models say the right pronoun in at least 95% of the held-out stories, with scaled scores",
    min(scores_of[kind][:, 1].min() for kind in models if kind[1] == "scaled") > 0.95,
    f"Guessing among three pronouns would give {1 / 3:.2f}.",
)

# %% [markdown]
# ## What the heads have learned
#
# First the short sentences, averaged over the 8 heads of each layer, before and after training. To translate "am"
# nothing but the word itself is needed, and for *gehen wir* "let's" has to see "go".

# %%
SHOWN = (8, "scaled")
before, after, _ = models[SHOWN][0]
short_tokens = numbers([sentence.lower() for sentence in SENTENCES[:2]], ENGLISH)
figure, grid = plt.subplots(2, 4, figsize=(11, 5))
for column, (name, parameters) in enumerate((("before", before), ("after", after))):
    _, _, weights = look(parameters, short_tokens, SCALES[SHOWN], num_heads=8)
    for row, sentence in enumerate(SENTENCES[:2]):
        count = len(words_of(sentence))
        for layer in range(LAYERS):
            axes = grid[row, 2 * column + layer]
            mean = weights[layer, row, :, :count, :count].mean(0)
            image = heatmap(axes, mean, words_of(sentence), f"{name} training, layer {layer}")
figure.colorbar(image, ax=grid, shrink=0.6, label="weight, mean over heads")
plt.show()

# %% [markdown]
# Now the long sentence, every head of one model with 8 heads and of one with 12. Above each panel is the word at which
# "it" looks most.

# %%
for kind in ((8, "scaled"), (12, "scaled")):
    weights = look(models[kind][0][1], long_tokens, SCALES[kind], num_heads=kind[0])[2]
    for layer in range(LAYERS):
        show_heads(weights[layer, 0], words, f"{kind[0]} heads after training, layer {layer}")

# %% [markdown]
# What each head does, in numbers: the mean weight, over all held-out stories, that a word gives to itself, to the word
# before and the word after it, and that "it" gives to its referent, to the other noun and to the verb.

# %%
for kind in ((8, "scaled"), (12, "scaled")):
    weights = np.array(look(models[kind][0][1], story_tokens, SCALES[kind], num_heads=kind[0])[2])  # L B N T S
    it = weights[..., -1, :]
    rows = np.arange(len(referents))
    columns = {
        "itself": np.diagonal(weights, axis1=-2, axis2=-1).mean((1, 3)),
        "before": np.diagonal(weights, -1, -2, -1).mean((1, 3)),
        "after": np.diagonal(weights, 1, -2, -1).mean((1, 3)),
        "it: referent": it[:, rows, :, referents].mean(0),
        "it: other noun": it[:, rows, :, others].mean(0),
        "it: verb": it[..., -2].mean(1),
    }
    print(
        f"{kind[0]} heads; evenly spread weights would be {1 / S:.2f}\n"
        + " " * 15
        + "".join(f"{c:>16}" for c in columns)
    )
    for layer, head in np.ndindex(LAYERS, kind[0]):
        numbers_of_head = "".join(f"{table[layer, head]:16.2f}" for table in columns.values())
        print(f"layer {layer} head {head:2}{numbers_of_head}")

# %% [markdown]
# ## Claim 2: "it" attends to the pizza
#
# Three questions that are easily taken for one:
#
# - Where does "it" look? The weights of "it", averaged over all heads and layers, and those of its best head.
# - Is that a matter of what "it" means? If "hugged" takes the place of "ate", "it" is the baby, and the weight should
#   move.
# - Does the answer depend on it? We hide one word at a time from "it" (a `mask`, in both layers) and see how much
#   log-probability the right pronoun loses. A weight shows where a head looks; only this shows what it is good for.

# %%
PIZZA, BABY = words.index("pizza"), words.index("baby")
hugged_tokens = numbers([" ".join(words).replace("ate", "hugged")], ENGLISH)
hidden = np.ones((S, 1, S, S), bool)
hidden[np.arange(S), 0, -1, np.arange(S)] = False  # in copy j of the sentence, "it" does not see word j


def claim_two(kind, parameters):
    """Weights of "it" on each word `L N S`, those with "hugged", and what hiding each word costs `S`."""
    options = {"num_heads": kind[0]}
    whole, _, ate = look(parameters, long_tokens, SCALES[kind], **options)
    hugged = look(parameters, hugged_tokens, SCALES[kind], **options)[2]
    copies = jnp.repeat(long_tokens, S, axis=0)
    without = look(parameters, copies, SCALES[kind], hidden, **options)[0][:, -1, long_targets[0, -1]]
    return [np.array(x) for x in (ate[:, 0, :, -1], hugged[:, 0, :, -1], whole[0, -1, long_targets[0, -1]] - without)]


def tops(rows):
    return [words[int(row.argmax())] for row in rows]


figure, grid = plt.subplots(2, 2, figsize=(11, 6), sharex=True)
for column, kind in enumerate(((8, "scaled"), (12, "scaled"))):
    untrained = [claim_two(kind, before)[0].mean((0, 1)) for before, _, _ in models[kind]]
    ate, hugged, cost = (
        np.array(x) for x in zip(*(claim_two(kind, after) for _, after, _ in models[kind]), strict=True)
    )
    means = {"untrained": np.array(untrained), "ate": ate.mean((1, 2)), "hugged": hugged.mean((1, 2))}
    for index, (name, numbers_of_it) in enumerate(means.items()):
        error = numbers_of_it.mean(0) - numbers_of_it.min(0), numbers_of_it.max(0) - numbers_of_it.mean(0)
        at, colour = np.arange(S) + 0.27 * (index - 1), ("gray", BLUE, ORANGE)[index]
        grid[0, column].bar(at, numbers_of_it.mean(0), 0.27, yerr=error, color=colour, label=name)
    error = cost.mean(0) - cost.min(0), cost.max(0) - cost.mean(0)
    grid[1, column].bar(range(S), cost.mean(0), yerr=error, color=GREEN)
    grid[0, column].axhline(1 / S, color="black", linewidth=0.6, linestyle=":")
    grid[0, column].set_title(f'{kind[0]} heads: mean weight of "it" on each word ({SEEDS} seeds)')
    grid[1, column].set_title('log-probability lost if "it" cannot see the word (nats)')
    grid[1, column].set_xticks(range(S), words, rotation=90)
    grid[0, column].legend()

    verdict(
        f'{kind[0]} heads, untrained: of all words, "it" gives the pizza the largest mean weight, in every seed',
        tops(means["untrained"]) == ["pizza"] * SEEDS,
        f"Largest: {listed(tops(means['untrained']))}; the pizza has {means['untrained'][:, PIZZA].mean():.3f}, even "
        f"spread is {1 / S:.3f}.",
    )
    verdict(
        f'{kind[0]} heads, trained: of all words, "it" gives the pizza the largest mean weight, in every seed',
        tops(means["ate"]) == ["pizza"] * SEEDS,
        f"Largest: {listed(tops(means['ate']))}; the pizza has {listed(means['ate'][:, PIZZA])}, "
        f"the baby {listed(means['ate'][:, BABY])}.",
    )
    best = ate[..., PIZZA].max((1, 2))
    verdict(
        f'{kind[0]} heads, trained: some head gives the pizza more than half of the weight of "it", in every seed',
        bool((best > 0.5).all()),
        f"Best heads: {listed(best)}.",
    )
    verdict(
        f'{kind[0]} heads, trained: "hugged" moves the weight of "it" from the pizza to the baby, in every seed',
        bool((means["hugged"][:, BABY] > means["hugged"][:, PIZZA]).all()),
        f"The pizza falls to {listed(means['hugged'][:, PIZZA])}, the baby rises to "
        f"{listed(means['hugged'][:, BABY])}.",
    )
    verdict(
        f"{kind[0]} heads, trained: hiding the pizza costs the pronoun more than hiding any other word, in every seed",
        tops(cost) == ["pizza"] * SEEDS,
        f"Costliest: {listed(tops(cost))}; the pizza costs {listed(cost[:, PIZZA])} nats.",
    )
plt.show()

# %% [markdown]
# One sentence is an anecdote. Over all held-out stories:

# %%
for kind in ((8, "scaled"), (12, "scaled")):
    shares, masses = [], []
    for parameters in [after for _, after, _ in models[kind]]:
        it = look(parameters, story_tokens, SCALES[kind], num_heads=kind[0])[2][..., -1, :].mean((0, 2))
        mass, other = it[np.arange(len(it)), referents], it[np.arange(len(it)), others]
        shares.append(float((mass > other).mean()))
        masses.append((float(mass.mean()), float(other.mean())))
    verdict(
        f'{kind[0]} heads, trained: "it" weighs its referent more than the other noun in 90% of {len(it)} stories',
        min(shares) > 0.9,
        f"Shares: {listed(shares)}; mean weights of referent and other noun "
        f"{'; '.join(f'{a:.2f} and {b:.2f}' for a, b in masses)}.",
    )

# %% [markdown]
# ## Claims 1 and 3 again, in the trained model

# %%
for layer in range(LAYERS):
    rows = []
    for kind in ((8, "scaled"), (12, "scaled")):
        for before, after, _ in models[kind]:
            both = (look(p, story_tokens, SCALES[kind], num_heads=kind[0])[1][layer] for p in (before, after))
            rows.append([float(self_first(scores).mean()) for scores in both])
    untrained, trained = np.array(rows).T
    verdict(
        f"trained, layer {layer}: a word is most similar to itself in most rows of scores",
        trained.min() > 0.5,
        f"Share of rows: {trained.min():.2f} to {trained.max():.2f} after training, {untrained.min():.2f} to "
        f"{untrained.max():.2f} before, chance {1 / S:.2f} ({len(rows)} models).",
    )

traces = {}
for kind in ((8, "scaled"), (8, "unscaled")):
    numbers_of_kind = [look(before, story_tokens, SCALES[kind], num_heads=8)[2] for before, _, _ in models[kind]]
    traces[kind[1]] = float(np.mean([1 - (p**2).sum(-1).mean() for p in numbers_of_kind]))
verdict(
    "a model with heads of 12 coordinates starts saturated without the scale",
    traces["unscaled"] < saturated_below,
    f"Trace {traces['unscaled']:.2f} without, {traces['scaled']:.2f} with it; saturated below {saturated_below:.2f}.",
)
scaled, unscaled = (scores_of[8, name][:, 1] for name in ("scaled", "unscaled"))
verdict(
    "trained without the scale, the model says fewer right pronouns, in every seed",
    bool((unscaled < scaled).all()),
    f"Share of right pronouns {listed(unscaled)} without, {listed(scaled)} with it.",
)
