"""Efficient attention for JAX: an exact baseline, interchangeable approximations, and a bound on each error.

The import line of a method is its registration.
"""

from attention.api import attention_steps, certified_attention, dot_product_attention
from attention.chunked import Chunked
from attention.diagnostics import Diagnostics, diagnostics
from attention.exact import AttentionSteps, Exact
from attention.expressions import make_method, parse_method
from attention.fused import Fused
from attention.linear import CosFormer, Hedgehog, LinearElu, Nystrom, Performer, Taylor
from attention.method import METHODS, Capabilities, Certificate, Cost, Method, Params, UnsupportedError
from attention.scale_rules import SCALE_RULES, adaptive_factor, visible_keys, yarn_factor
from attention.sparse import BlockTopK, Certified, Hashed, LocalChunked, Sampled, SlidingWindow, TopK

__all__ = [
    "METHODS",
    "SCALE_RULES",
    "AttentionSteps",
    "BlockTopK",
    "Capabilities",
    "Certificate",
    "Certified",
    "Chunked",
    "CosFormer",
    "Cost",
    "Diagnostics",
    "Exact",
    "Fused",
    "Hashed",
    "Hedgehog",
    "LinearElu",
    "LocalChunked",
    "Method",
    "Nystrom",
    "Params",
    "Performer",
    "Sampled",
    "SlidingWindow",
    "Taylor",
    "TopK",
    "UnsupportedError",
    "adaptive_factor",
    "attention_steps",
    "certified_attention",
    "diagnostics",
    "dot_product_attention",
    "make_method",
    "parse_method",
    "visible_keys",
    "yarn_factor",
]
