"""Linear attention: one feature map a file, over one engine."""

from attention.linear.performer import Performer
from attention.linear.theory import features_needed

__all__ = ["Performer", "features_needed"]
