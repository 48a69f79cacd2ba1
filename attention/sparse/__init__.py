"""Sparse attention: which keys each row reads, with bounds on what the others could have changed."""

from attention.sparse.block_topk import BlockTopK
from attention.sparse.certified import Certified
from attention.sparse.hashed import Hashed
from attention.sparse.local import LocalChunked
from attention.sparse.sampled import Sampled
from attention.sparse.topk import TopK
from attention.sparse.window import SlidingWindow

__all__ = ["BlockTopK", "Certified", "Hashed", "LocalChunked", "Sampled", "SlidingWindow", "TopK"]
