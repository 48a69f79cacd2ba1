"""One training run."""

from experiments.steps import Levers, TrainState, levers, make_evaluate, make_init, make_step

__all__ = ["Levers", "TrainState", "levers", "make_evaluate", "make_init", "make_step"]
