"""Errors over their bounds."""

import numpy as np


def over(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Above 1 just where the error is above its bound, or no number; 0 where the bound is 0 or infinite and holds."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where((error <= bound) & ((bound == 0) | np.isinf(bound)), 0, error / bound)
    return np.where(np.isnan(ratio), np.inf, ratio)
