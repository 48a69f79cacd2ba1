"""Linear attention: one feature map a file, over one engine; and landmarks."""

from attention.linear.cosformer import CosFormer
from attention.linear.elu import LinearElu
from attention.linear.hedgehog import Hedgehog, distillation_loss
from attention.linear.nystrom import Nystrom
from attention.linear.performer import Performer
from attention.linear.taylor import Taylor
from attention.linear.theory import features_needed

__all__ = [
    "CosFormer",
    "Hedgehog",
    "LinearElu",
    "Nystrom",
    "Performer",
    "Taylor",
    "distillation_loss",
    "features_needed",
]
