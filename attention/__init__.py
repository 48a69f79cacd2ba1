"""Efficient attention for JAX: an exact baseline, interchangeable approximations, and a bound on each error.

The import line of a method is its registration.
"""

from attention.api import attention_steps, certified_attention, dot_product_attention
from attention.chunked import Chunked
from attention.diagnostics import Diagnostics, diagnostics
from attention.exact import AttentionSteps, Exact
from attention.fused import Fused
from attention.linear import CosFormer, Hedgehog, LinearElu, Nystrom, Performer, Taylor
from attention.method import (
    METHODS,
    Capabilities,
    Certificate,
    Cost,
    Method,
    Params,
    UnsupportedError,
    make_method,
    parse_method,
)
from attention.sparse import TopK

__all__ = [
    "METHODS",
    "AttentionSteps",
    "Capabilities",
    "Certificate",
    "Chunked",
    "CosFormer",
    "Cost",
    "Diagnostics",
    "Exact",
    "Fused",
    "Hedgehog",
    "LinearElu",
    "Method",
    "Nystrom",
    "Params",
    "Performer",
    "Taylor",
    "TopK",
    "UnsupportedError",
    "attention_steps",
    "certified_attention",
    "diagnostics",
    "dot_product_attention",
    "make_method",
    "parse_method",
]
