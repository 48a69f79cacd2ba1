"""Attention for Flax: a function for the layers that Flax has, and a layer of our own. Needs `flax`."""

from attention.flax.functional import attention_fn
from attention.flax.layer import DecodingState, MultiHeadAttention
from attention.flax.parts import Constant, SpectralLinear

__all__ = ["Constant", "DecodingState", "MultiHeadAttention", "SpectralLinear", "attention_fn"]
