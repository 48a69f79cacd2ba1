"""Softmax attention in C, called through XLA's foreign function interface."""
