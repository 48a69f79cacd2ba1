"""AdamW whose peak learning rate is an argument, so that a sweep over it compiles once."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from experiments.config import Optimizer


def descent(config: Optimizer) -> optax.GradientTransformation:
    """Clipping, Adam, and decoupled weight decay of matrices; the update before the learning rate.

    References:
        Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101, algorithm 2.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale(-1.0),
    )


def matrices(parameters):
    """Which parameters decay: those with at least two axes; not the gains of norms."""
    return jax.tree.map(lambda x: x.ndim >= 2, parameters)


def unit_schedule(config: Optimizer, steps: int, step: Int[Array, ""]) -> Float[Array, ""]:
    """The share of the peak learning rate at a step, counted from 0: a linear rise, then half a cosine.

    1 after `warmup_steps`, `final_share` in the last step; no step has rate 0 unless `final_share` is 0.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.final_share,
    )
    return jnp.asarray(schedule(step + 1), jnp.float32)
