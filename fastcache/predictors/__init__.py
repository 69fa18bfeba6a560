# SPDX-License-Identifier: Apache-2.0
"""What stands in for a skipped value: weights over its history, without torch."""

from .base import MAX_ORDER, Predictor
from .dmd import DMD
from .extrapolate import Constant, Extrapolate
from .fitted import Fitted
from .guided import Guided
from .polynomials import Chebyshev, Hermite
from .reuse import Reuse, Zeros
from .taylor import Taylor, TaylorTable, latest_gap_weights, polynomial_weights

__all__ = [
    "DMD",
    "MAX_ORDER",
    "Chebyshev",
    "Constant",
    "Extrapolate",
    "Fitted",
    "Guided",
    "Hermite",
    "Predictor",
    "Reuse",
    "Taylor",
    "TaylorTable",
    "Zeros",
    "latest_gap_weights",
    "polynomial_weights",
]
