# SPDX-License-Identifier: Apache-2.0
"""What a decision looks at: where in the model, and what it is held against. Pure data, no torch."""

from .base import Against, At, Measure, Signal

__all__ = [
    "Against",
    "At",
    "Measure",
    "Signal",
]
