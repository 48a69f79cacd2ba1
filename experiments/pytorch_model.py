"""The language model of `experiments.model` and its step in PyTorch, a peer to race; PyTorch is no dependency.

It reads the parameters of ours, so that both start from the same numbers and compute the same loss.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch  # ty: ignore[import-not-found] (a peer to race, never needed)
from torch import nn  # ty: ignore[import-not-found]
from torch.nn import functional  # ty: ignore[import-not-found]

from attention.positions import BASE
from experiments.config import Run
from experiments.optimizer import unit_schedule

EPSILON = 1e-6  # of the norms, as in flax


class Block(nn.Module):
    """A block with rotary positions, `scaled_dot_product_attention` and a gated MLP."""

    def __init__(self, run: Run, named: Callable[[str], np.ndarray]):
        super().__init__()
        self.heads, self.kv_heads = run.model.heads, run.model.kv_heads
        self.attention_gain = nn.Parameter(torch.tensor(named("attention_norm/scale")))
        self.mlp_gain = nn.Parameter(torch.tensor(named("mlp_norm/scale")))
        for name in ("query", "key", "value", "output"):
            setattr(self, name, _linear(named(f"attention/{name}/kernel")))
        for name in ("gate", "up", "down"):
            setattr(self, name, _linear(named(f"{name}/kernel")))

    def forward(self, x, angles):
        h = functional.rms_norm(x, x.shape[-1:], self.attention_gain, EPSILON)
        query, key = (rotated(self._split(y), angles) for y in (self.query(h), self.key(h)))
        grouped = {"enable_gqa": True} if self.heads != self.kv_heads else {}
        attended = functional.scaled_dot_product_attention(
            query, key, self._split(self.value(h)), is_causal=True, **grouped
        )
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        h = functional.rms_norm(x, x.shape[-1:], self.mlp_gain, EPSILON)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))

    def _split(self, x):
        """Heads first, `B N T H`."""
        return x.unflatten(-1, (-1, self.query.out_features // self.heads)).transpose(1, 2)


class LanguageModel(nn.Module):
    """Logits of the next byte, with the parameters of ours by their names."""

    def __init__(self, run: Run, parameters: dict[str, np.ndarray]):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.tensor(parameters["embedding/embedding"]), freeze=False)
        self.blocks = nn.ModuleList(
            Block(run, lambda name, i=i: parameters[f"blocks/{i}/{name}"]) for i in range(run.model.layers)
        )
        self.gain = nn.Parameter(torch.tensor(parameters["norm/scale"]))
        self.head = _linear(parameters["head/kernel"])
        half = run.model.width // run.model.heads // 2
        rates = BASE ** -(torch.arange(half) / half)
        self.register_buffer("angles", torch.arange(run.model.context)[:, None] * rates)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.angles)
        return self.head(functional.rms_norm(x, x.shape[-1:], self.gain, EPSILON))


def rotated(x, angles):
    """`attention.positions.rotated` of `B N T H`."""
    cosine, sine = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def _linear(kernel: np.ndarray):
    layer = nn.Linear(*kernel.shape, bias=False)
    layer.weight = nn.Parameter(torch.tensor(kernel.T.copy()))
    return layer


def make_step(run: Run, parameters: dict[str, np.ndarray], *, compiled: bool) -> Callable[[Any], float]:
    """The function that takes one optimizer step on tokens `B T+1` and returns the loss before it.

    AdamW with the run's schedule, clipping, and decay of matrices alone, as `experiments.optimizer` has them.
    """
    model, options = LanguageModel(run, parameters), run.optimizer
    trained = list(model.parameters())
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    descent = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.b1, options.b2), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        descent, lambda step: float(unit_schedule(options, run.steps, jnp.asarray(step)))
    )
    forward = torch.compile(model) if compiled else model

    def step(tokens: Any) -> float:
        tokens = torch.as_tensor(np.asarray(tokens), dtype=torch.long)
        logits = forward(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        descent.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, options.clip_norm)
        descent.step()
        schedule.step()
        return loss.item()

    return step


def attention_alone(query: Any, key: Any, value: Any, cotangent: Any, batch: int) -> Callable[[], Any]:
    """The gradient of one layer's attention, of operands `1 T N H` repeated along the batch axis."""
    arrays = (torch.tensor(x).transpose(1, 2).repeat(batch, 1, 1, 1) for x in (query, key, value, cotangent))
    *operands, cotangent = arrays
    for operand in operands:
        operand.requires_grad_()

    def call():
        attended = functional.scaled_dot_product_attention(*operands, is_causal=True)
        return torch.autograd.grad((attended * cotangent).sum(), operands)

    return call
