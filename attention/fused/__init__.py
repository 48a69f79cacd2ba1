"""The kernels of vendors behind one name."""

from attention.fused.method import Fused

__all__ = ["Fused"]
