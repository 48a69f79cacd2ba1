"""Exact attention in memory linear in the length."""

from attention.chunked.method import Chunked

__all__ = ["Chunked"]
