# SPDX-License-Identifier: Apache-2.0
"""When to reuse: pure Python on host numbers, no torch."""

from .base import COMPUTE, REUSE, Action, Decision, Policy, Run, Step
from .dual import DualBlock
from .first_block import FirstBlock
from .input_change import InputChange
from .magnitude import Calibrate, Magnitude
from .masks import steps_mask
from .misfit import Misfit
from .output_slope import OutputSlope
from .schedule import Broadcast, Growing, Interval, Mask, TimestepRange
from .sensitivity import Sensitivity
from .spread import Spread
from .widening import Widening

__all__ = [
    "COMPUTE",
    "REUSE",
    "Action",
    "Broadcast",
    "Calibrate",
    "Decision",
    "DualBlock",
    "FirstBlock",
    "Growing",
    "InputChange",
    "Interval",
    "Magnitude",
    "Mask",
    "Misfit",
    "OutputSlope",
    "Policy",
    "Run",
    "Sensitivity",
    "Spread",
    "Step",
    "TimestepRange",
    "Widening",
    "steps_mask",
]
