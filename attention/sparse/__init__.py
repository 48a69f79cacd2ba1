"""Sparse attention: which keys each row reads, with bounds on what the others could have changed."""

from attention.sparse.certified import Certified
from attention.sparse.topk import TopK

__all__ = ["Certified", "TopK"]
