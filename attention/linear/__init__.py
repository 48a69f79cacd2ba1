"""Linear attention: one feature map a file, over one engine."""

from attention.linear.cosformer import CosFormer
from attention.linear.elu import LinearElu
from attention.linear.performer import Performer

__all__ = ["CosFormer", "LinearElu", "Performer"]
