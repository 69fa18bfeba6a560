"""What stands in for a skipped value: weights over its history, without torch."""

from .base import MAX_ORDER, Predictor
from .extrapolate import Extrapolate
from .guided import Guided
from .reuse import Reuse, Zeros
from .taylor import Taylor, TaylorTable, latest_gap_weights, polynomial_weights

__all__ = [
    "MAX_ORDER",
    "Extrapolate",
    "Guided",
    "Predictor",
    "Reuse",
    "Taylor",
    "TaylorTable",
    "Zeros",
    "latest_gap_weights",
    "polynomial_weights",
]
