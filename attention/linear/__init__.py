"""Linear attention: one feature map a file, over one engine."""

from attention.linear.performer import Performer

__all__ = ["Performer"]
